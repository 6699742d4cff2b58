# %% [markdown]
# # 6. Reward hacking
# A verifier that is a little too generous, a policy that finds out, and you repair the verifier. Then the same with
# sentences of a language model. About 45 minutes, two training runs.
# %%
import os
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="IProgress")  # a progress bar of tqdm that we do not use

REPOSITORY = ""  # in Colab: the address of the repository
here = [Path.cwd(), *Path.cwd().parents, Path("grpo").resolve()]
if REPOSITORY and not any((p / "grpo.py").exists() for p in here):
    os.system(f"git clone -q {REPOSITORY} grpo && pip install -q -r grpo/requirements.txt")
ROOT = next(p for p in here if (p / "grpo.py").exists())
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "notebooks")) if p not in sys.path]

import inspect
import json
from functools import partial

import viz
from IPython.display import clear_output, display
from workshop import check, compare, predict

# %%
import experiments
from exercises import EXPLOITS, PROBLEM
from experiments import recorded
from mathformer import ArithmeticTask
from mathformer.task import COMPLETION  # the pattern (<scratchpad>steps)?<answer>answer, for your answer
from harness import loading
from harness.command_line import PRESET, parse_config
from tasks.sentences import SENTENCE, sentence_reward, words_of

SEED = 0  # take another seed than your neighbour
# %% [markdown]
# ## A generous verifier
# "Showing work is good, so each true equation is paid, and the answer may stand anywhere." It sounds helpful.
# %%
print(inspect.getsource(experiments.Generous))
# %% [markdown]
# Three leaks at least. Predict, after 50 steps (the recorded runs go on to 60): the reward it measures (0.7 at the
# start), and the share of answers that are right (0.48 at the start).
# %%
predict(reward=None, correct=None)  # a number for each None
# %%
hacked, _, rollouts = experiments.run(SEED, steps=50, **experiments.ARMS["generous"])
clear_output()
compare(**{key: sum(row[key] for row in hacked[-5:]) / 5 for key in ("reward", "correct")})
generous = {"generous": [one["rows"] for one in recorded("generous")]}  # three seeds, recorded
yours = {"yours": experiments.means_of_five(hacked)}
figure = viz.curves(generous, ["reward", "correct", "length"], yours)
# %% [markdown]
# The reward rises all the way. If you log the reward alone, this is your best run. Now read what it wrote:
# %%
_, tokenizer = loading.load_model(parse_config(["--config", str(PRESET)]).model)
groups = [rollouts[i : i + 8] for i in range(0, len(rollouts), 8)]
best_paid = max(groups, key=lambda group: sum(row["reward"] for row in group))
display(viz.group_table(best_paid[:4], tokenizer))
# %% [markdown]
# ## Repair it
# Keep the good idea, pay for steps, and close the leaks. `value` is 14 and `steps` are `["3*4=12", "12+2=14"]` for the
# problem `(3*4)+2`. A right answer is 1; else up to 0.5, in proportion to the steps of *this problem* that are there; 0
# for any text that is not as a whole `<answer>N` or `<scratchpad>STEP;STEP<answer>N`.
#
# Hint 1, a question: Which texts have to be 0 whatever they contain?
#
# Hint 2, the formula: 1 if N is value, else 0.5 · |{steps that are shown}| / |steps|. Going over `steps`, and not over
# what the text shows, counts each once.
#
# Hint 3, a line with a hole: `match = COMPLETION.____(text)`; then `match["answer"]`, and `match["steps"]`, which is
# None where there is no scratchpad.
# %%
def repaired_reward(text, value, steps):
    """1.0 for the right answer, else up to 0.5 for the share of `steps`, such as "3*4=12", that the text shows.

    0.0 for any text that is not `<answer>N` or `<scratchpad>STEP;STEP;...<answer>N` as a whole.
    """
    raise NotImplementedError
# %%
repaired_reward = check(repaired_reward)
# %% [markdown]
# ## The exploits, before and after
# One of them is worth 0.25, honestly: it shows one of the two steps.
# %%
value, steps = PROBLEM
leaky, problem = experiments.Generous(), {"value": value, "steps": [], "endian": "<big>"}
print("generous  yours")
for what, (text, _) in EXPLOITS.items():
    before, after = leaky.reward(text, problem)["reward"], repaired_reward(text, value, steps)
    print(f"{before:8.2f} {after:6.2f}  {what}: {text[:48]}")
# %% [markdown]
# ## Train with your verifier
# The same settings (a learning rate of 1e-3), seed and number of steps. Predict the reward and the share of right
# answers.
# %%
predict(repaired_reward=None, repaired_correct=None)  # a number for each None
# %%
class Repaired(ArithmeticTask):
    def reward(self, text, example):
        steps = [f"{left}={right}" for left, right in example["steps"]]
        return super().reward(text, example) | {"reward": repaired_reward(text, example["value"], steps)}


repaired, _, _ = experiments.run(SEED, steps=50, task=f"{__name__}:Repaired", lr=1e-3)
clear_output()
compare(**{f"repaired_{key}": sum(row[key] for row in repaired[-5:]) / 5 for key in ("reward", "correct")})
# %%
arms = {arm: [one["rows"] for one in recorded(arm)] for arm in ("generous", "repaired")}
figure = viz.curves(arms, ["correct", "length", "worked"], {"yours": experiments.means_of_five(repaired)})
# %% [markdown]
# ## A leak that one run of three found
# Paying 1 wherever the right number occurs, and nothing for equations, is a leak too: a list of all numbers would
# always be paid. Recorded, with the settings of notebook 4:
# %%
anywhere = {arm: [one["rows"] for one in recorded(arm)] for arm in ("base", "anywhere")}
figure = viz.curves(anywhere, ["reward", "correct", "length"])
# %% [markdown]
# Explain: why was this leak hardly exploited in two of the runs?
#
# Answer: The policy only finds what it already writes now and then. Honest work was one step away and paid as well; a
# list of numbers was never sampled. That is luck, not safety. In the third run `reward` ends at 0.72 and `correct` at
# 0.59: it writes `5*9=45;45-8=37<answer>3`. The last step has the right number, which is paid, so that nothing teaches
# it to copy the answer with care.
#
# Explain: what would have told you during the run?
#
# Answer: Reading rollouts; a length that runs to the cap; and a strict measure that is not trained on (`correct` here,
# which `grpo.py` logs beside the reward).
#
# ## A language model does it, too
# SmolLM2, with 135 million parameters, was asked for "one short sentence with the words ice, town and cheese", and
# paid for each word. That took eight minutes on two CPU cores (docs/smollm2.md). The cell below first shows its most
# likely answers to three of 64 problems, whose words were in no training. At the end all are right, as the reward has
# it. Nobody said that a sentence should mean something.
#
# Make the reward stricter: it should pay the honest sentences, and none of those. There is no check, and no right
# answer. Beside yours are three rules that were tried. `strict` also asks for 6 to 16 words, each given word once,
# and two words or more between them; `own` pays for no worked example with other words filled in.
# %%
SEEDS = {"words": 2, "strict": 0, "own": 0}  # of the recorded runs


def answers(rule, step):
    file = ROOT / "benchmarks" / "results" / "smollm2" / f"{rule}-seed{SEEDS[rule]}-answers.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [(row["completion"], row["ground_truth"].split(", ")) for row in rows if row["step"] == step]


def read(rule):
    for step in (0, 10, 20):
        print(f"rule `{rule}`,", f"after {step} steps" if step else "before")
        for text, words in answers(rule, step)[:3]:
            print(f"   {', '.join(words):24} {text.strip()}")


def my_reward(text, words):
    """1 for a sentence that you would have wanted, else 0. This is what was paid: change it."""
    found, is_sentence = words_of(text), SENTENCE.fullmatch(text.strip())
    return float(bool(is_sentence) and all(word in found for word in words))


HONEST = [
    ("The farmer left his coat in the church.", ["farmer", "coat", "church"]),
    ("My sister fell asleep on the train with a book in her hand.", ["sister", "train", "book"]),
    ("Rain came through the roof and ruined our piano.", ["rain", "roof", "piano"]),
    ("He gave the dog a bone behind the kitchen door.", ["dog", "bone", "door"]),
]
read("words")
RULES = {name: partial(sentence_reward, rule=name) for name in SEEDS}
WRITTEN = {"honest sentences": HONEST, "before": answers("words", 0)}
WRITTEN |= {f"trained by `{name}`": answers(name, 20) for name in RULES}
print(f"\n{'share paid by:':20}   yours", *(f"{name:>7}" for name in RULES))
for what, pairs in WRITTEN.items():
    shares = [sum(my_reward(text, words) for text, words in pairs) / len(pairs)]
    for rule in RULES.values():
        shares.append(sum(rule(text, {"words": words})["correct"] for text, words in pairs) / len(pairs))
    print(f"{what:20}", *(f"{share:7.2f}" for share in shares))
print()
read("strict")
# %% [markdown]
# The model found the next cheapest thing. And the rule refuses an honest sentence: "the dog a bone" has only one word
# between the two that were given. `own` was made for another hack and changes little: `read("own")`.
#
# Explain: why does each rule only move the problem, and what would end it?
#
# Answer: The policy looks for the cheapest text that is paid, and a program can only say what it measures. Each rule
# closes one hole. What helps is what is harder to fool: another model as the judge, a reward for a group whose answers
# differ, a KL penalty that holds the policy near a model of language, and reading what it writes.
