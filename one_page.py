"""GRPO on one page: a tiny language model finds out, from reward alone, that thinking pays.

It was trained to answer `7-(4+8)*3` at once, and is wrong six times in ten. It can also write
down its steps first, and is then nearly always right, but it seldom does. Nobody tells it to.
It is paid 1 for a right answer and 0 for a wrong one.

    python one_page.py [seed]         a minute and a half on a CPU

Shapes: P prompts, G completions of each, B = P * G rows; prompts padded to L tokens and
completions to T; V tokens in the vocabulary.
"""

import math
import random
import sys
from pathlib import Path
from statistics import fmean

import torch

from mathformer import ArithmeticTask, MathformerForCausalLM
from mathformer.tokenizer import EOS, PAD, build_tokenizer

P, G = 32, 8  # prompts of a step, completions of a prompt
STEPS, MINIBATCHES = 60, 4  # each step's completions serve four updates
LR, CLIP = 7e-4, 0.2
LONGEST = 72  # tokens after which a completion is cut off

task = ArithmeticTask()
tokenizer = build_tokenizer()
eos, pad = tokenizer.convert_tokens_to_ids([EOS, PAD])


@torch.no_grad()
def sample(model, prompts, G, greedy=False):
    """G completions of each prompt; those of one prompt are neighbours.

    Returns ids [B, L + T]; old_logps [B, T], the log-prob with which each token was sampled; and
    mask [B, T], True on the tokens of a completion, with its end-of-sequence token.
    """
    # The padding is on the left, so that all completions begin in the same column.
    ids = tokenizer(prompts, padding=True, return_tensors="pt").input_ids.repeat_interleave(G, 0)
    new, cache, old_logps, mask = ids, None, [], []
    finished = torch.zeros(len(ids), dtype=torch.bool)
    while len(mask) < LONGEST and not finished.all():
        # The cache holds keys and values of what was read, so that only `new` has to be read.
        out = model(new, attention_mask=ids != pad, past_key_values=cache, use_cache=True)
        cache, logps = out.past_key_values, out.logits[:, -1].log_softmax(-1)  # [B, V]
        new = logps.argmax(-1, True) if greedy else torch.multinomial(logps.exp(), 1)  # [B, 1]
        new[finished] = pad
        old_logps.append(logps.gather(1, new))
        mask.append(~finished[:, None])
        ids = torch.cat([ids, new], 1)
        finished |= new[:, 0] == eos
    return ids, torch.cat(old_logps, 1), torch.cat(mask, 1)


def judge(problems, ids, mask):
    """The task's verdicts, B dicts with `reward`, `correct`, and `worked`: it shows steps."""
    G, verdicts = len(ids) // len(problems), []
    for i, completion in enumerate(ids[:, -mask.shape[1] :]):
        text = tokenizer.decode(completion[mask[i]]).removesuffix(EOS)
        verdicts.append(task.reward(text, problems[i // G]))
    return verdicts


def advantage(rewards):
    """How much better each completion was than the others of its group, [P, G] to [P, G].

    The group is its own baseline; PPO needs a second network for one. A group that is all right
    or all wrong has advantages of 0. It is called dead: there is nothing to learn from it.
    """
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def loss(model, ids, mask, old_logps, advantages):
    """The sum of the losses of all tokens. Advantages [B, 1]: a completion's tokens share one."""
    T = mask.shape[1]
    logits = model(ids, attention_mask=ids != pad).logits[:, -T - 1 : -1]  # j predicts j + 1
    logps = logits.log_softmax(-1).gather(2, ids[:, -T:, None])[:, :, 0]  # [B, T]
    # How much likelier is a token now than when it was sampled? 1 before the first update.
    ratio = (logps - old_logps).exp()
    # There, the gradient of ratio * A is that of logp * A, which is REINFORCE: tokens of good
    # completions become likelier, those of bad ones rarer.
    gain = ratio * advantages
    # PPO's clip: a token that has moved far enough this way gets no more gradient. What the old
    # model wrote says little about a distant one.
    limited_gain = ratio.clamp(1 - CLIP, 1 + CLIP) * advantages
    return -(torch.min(gain, limited_gain) * mask).sum()


def evaluate(model, problems):
    """Prints which share of the answers is right, and which share shows steps."""
    for G, greedy in (1, True), (2, False):
        ids, _, mask = sample(model, [task.prompt(p) for p in problems], G, greedy)
        verdicts = judge(problems, ids, mask)
        right, worked = (fmean(v[key] for v in verdicts) for key in ("correct", "worked"))
        how = "greedy" if greedy else "sampled"
        print(f"  {how:8} {right:6.1%} right, {worked:6.1%} show their steps", flush=True)


if __name__ == "__main__":
    seed, folder = sys.argv[1:] or ["0"], Path(__file__).parent / "mathformer" / "pretrained"
    if len(seed) > 1 or not seed[0].isdecimal():
        sys.exit("usage: python one_page.py [seed]")
    if not (folder / "model.safetensors").is_file():
        sys.exit(f"the pretrained model is missing: git checkout {folder}")
    torch.set_num_threads(1)  # so small a model gains nothing from a second one
    torch.manual_seed(int(seed[0]))
    rng = random.Random(int(seed[0]))
    model = MathformerForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    print("before training, on problems that are in no training")
    evaluate(model, task.eval())

    for step in range(STEPS):
        problems = [task.train(rng, step) for _ in range(P)]
        ids, old_logps, mask = sample(model, [task.prompt(p) for p in problems], G)
        verdicts = judge(problems, ids, mask)
        rewards = torch.tensor([v["reward"] for v in verdicts]).view(P, G)
        advantages = advantage(rewards).view(P * G, 1)

        for group in optimizer.param_groups:  # the learning rate falls along a cosine
            group["lr"] = LR * (1 + math.cos(math.pi * step / STEPS)) / 2
        alive = advantages[:, 0].nonzero()[:, 0]  # dead groups have no gradient
        for rows in alive[torch.randperm(len(alive))].chunk(MINIBATCHES):
            value = loss(model, ids[rows], mask[rows], old_logps[rows], advantages[rows])
            # All tokens of a step weigh the same, and those of dead groups count: otherwise the
            # others would weigh more.
            (value * MINIBATCHES / mask.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        if (step + 1) % 10 == 0:
            text = tokenizer.decode(ids[0][ids[0] != pad])
            print(f"step {step + 1}: mean reward {rewards.mean():.2f}   {text}", flush=True)
    print("after training")
    evaluate(model, task.eval())
