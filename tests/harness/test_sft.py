"""python -m harness.sft: worked examples teach a model a task's form."""

import random
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from architectures import tiny_model
from conftest import PRETRAINED, byte_tokenizer

import grpo
from harness import loading, optimizers, sft
from harness.prompts import encode_prompt
from mathformer import ArithmeticTask

SMALL = ["--model", PRETRAINED, "--task", "arithmetic", "--prompts_per_step", "8", "--max_completion_tokens", "64"]
SMALL += ["--max_prompt_tokens", "40", "--lr", "1e-3", "--device", "cpu"]


def command(*words, **more):
    line = [sys.executable, "-m", "harness.sft", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, **more)


@pytest.fixture
def loaded():
    """As `sft` has it before the first step, with plain SGD: a step is then the gradient."""
    words = [*SMALL, "--group_size", "2", "--tokens_per_microbatch", "128", "--grad_clip", "1000"]
    run = loading.load(grpo.parse_config(words))
    run.policy = grpo.Policy(run.model)
    run.optimizer = torch.optim.SGD(run.policy.parameters(), lr=1.0)
    return run


def test_it_teaches_to_show_steps_and_grpo_goes_on_from_there(tmp_path):
    """The base gives most answers at once; what is shown is worked out. From the command line, and then grpo.py's."""
    done = command(*SMALL, "--steps", 40, "--output", tmp_path / "taught")
    assert done.returncode == 0, done.stderr
    assert "loading torch" in done.stdout and "40 steps" in done.stdout and str(tmp_path / "taught") in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taught"]
    words = [*SMALL, "--model", str(tmp_path / "taught"), "--steps", "0", "--eval_samples", "1"]
    row = grpo.train(grpo.parse_config([*words, "--task_args.eval_size", "100", "--runs", str(tmp_path)]))["last"]
    assert row["worked"] > 0.8 and row["accuracy"] > 0.6 and row["truncated"] < 0.1, row


def test_a_step_is_the_mean_over_completion_tokens(loaded):
    """By hand: cross-entropy of each row alone, through the model as it is, the end-of-sequence token with it."""
    rows, too_long = sft.draw_rows(loaded, 3)
    assert len(rows) == 16 and too_long == 0 and len({row.length for row in rows}) > 2
    model, _ = loading.load_model(PRETRAINED)
    total, summed = 0, 0.0
    for row in rows:
        assert (
            row.completion_ids[-1] == loaded.tokenizer.eos_token_id
            and row.completion_ids.count(row.completion_ids[-1]) == 1
        )
        n, ids = len(row.prompt_ids), torch.tensor([row.prompt_ids + row.completion_ids])
        summed = summed + F.cross_entropy(model(ids).logits[0, n - 1 : -1], ids[0, n:], reduction="sum")
        total += row.length
    (summed / total).backward()
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    assert sft.sft_step(loaded, rows) == pytest.approx(summed.item() / total, rel=1e-5)
    for name, p in model.named_parameters():
        moved = before[name] - dict(loaded.model.named_parameters())[name]
        assert torch.allclose(moved, p.grad, atol=1e-6), name
    assert all(p.grad is None for p in loaded.model.parameters())


def test_rows_are_the_tasks_demonstrations_behind_its_prompts(loaded):
    rows, _ = sft.draw_rows(loaded, 1)
    rng, task = random.Random("0/1/sft"), ArithmeticTask()
    for row in rows:
        example, text = task.demonstration(rng)
        assert row.prompt_ids == encode_prompt(loaded.tokenizer, task, example)[1]
        assert loaded.tokenizer.decode(row.completion_ids[:-1]) == text
    assert sft.draw_rows(loaded, 1)[0] == rows != sft.draw_rows(loaded, 2)[0]
    loaded.config = grpo.parse_config([*SMALL, "--max_completion_tokens", "12"])
    rows, too_long = sft.draw_rows(loaded, 1)
    assert len(rows) == 64 and max(row.length for row in rows) <= 12 and too_long > 0
    loaded.config = grpo.parse_config([*SMALL, "--max_completion_tokens", "2"])
    with pytest.raises(grpo.UsageError, match="nearly all demonstrations are over .* max_completion_tokens = 2"):
        sft.draw_rows(loaded, 1)


def test_settings_mean_what_they_mean_in_a_run(tmp_path, monkeypatch):
    """Rate and schedule, clipping, seed, rows of a step, and the number of steps."""
    seen = []
    step = torch.optim.AdamW.step

    def watched(self, *args):
        norm = sum(p.grad.square().sum() for group in self.param_groups for p in group["params"]).sqrt().item()
        seen.append((self.param_groups[0]["lr"], norm))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    words = [*SMALL, "--steps", "4", "--lr_schedule", "linear", "--warmup_steps", "2", "--grad_clip", "0.01"]
    config = grpo.parse_config(words)
    losses = sft.sft(config, tmp_path / "one")
    assert len(losses) == 4 and losses[0] != losses[1]
    assert [lr for lr, _ in seen] == [optimizers.learning_rate(config, i) for i in range(1, 5)]
    assert all(norm <= 0.01001 for _, norm in seen)
    other = sft.sft(grpo.parse_config([*words, "--seed", "1"]), tmp_path / "two")
    assert other != losses == sft.sft(config, tmp_path / "three")
    weights = [loading.load_model(str(tmp_path / name))[0].state_dict() for name in ("one", "two", "three")]
    assert all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])
    assert any(not torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_a_chat_model_learns_its_turns_end(qwen3_folder, tmp_path):
    """Messages go through the chat template, and what is written is an ordinary folder."""
    words = f"--model {qwen3_folder} --task sentences --steps 2 --prompts_per_step 1 --group_size 2 --lr 1e-3"
    config = grpo.parse_config([*words.split(), "--max_prompt_tokens", "300", "--few_shot", "1"])
    run = loading.load(config)
    row = sft.draw_rows(run, 1)[0][0]
    prompt = run.tokenizer.decode(row.prompt_ids)
    assert prompt.count("user: ") == 2 and prompt.endswith("assistant: ") and row.completion_ids[-1] == 0
    sft.sft(config, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    before = transformers.AutoModelForCausalLM.from_pretrained(qwen3_folder)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def chat_folder(tmp_path, template: str) -> str:
    """A model with two ends: <eos>, and <pad>, with which its template ends a turn."""
    tokenizer, model = byte_tokenizer(), tiny_model("llama")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "chat")
    model.save_pretrained(tmp_path / "chat")
    return str(tmp_path / "chat")


LENGTHS = ["--max_prompt_tokens", "200", "--max_completion_tokens", "50"]
ENDS_TURNS = "{% for m in messages %}{{ m.content }}<pad>{% endfor %}{% if add_generation_prompt %}OPEN{% endif %}"
SHOWS_LINES = """
from tasks.sentences import Sentences

class Lines(Sentences):
    def prompt(self, example):
        return PROMPT
    def demonstration(self, rng):
        return {"words": [str(rng.random())]}, "<think>a\\n \\nb</think>c"
"""


@pytest.mark.parametrize(
    "prompt, more, learned",
    [
        ("'Q' + example['words'][0]", [], "<think>a\n \nb</think>c<eos>"),
        ("'Q' + example['words'][0]", ["--few_shot", "1"], "<think>a\nb</think>c<eos>"),  # as in the prompt
        ("[dict(role='user', content='Q' + example['words'][0])]", [], "<think>a\n \nb</think>c<pad>"),
        ("[dict(role='user', content='Q' + example['words'][0])]", ["OPEN"], "a\n \nb</think>c<pad>"),
    ],
)
def test_what_is_learned_is_what_a_run_pays(prompt, more, learned, tmp_path):
    """The turn's own end in a chat; no <think> where the template opens it; no blank line where that ends an answer."""
    (tmp_path / "lines.py").write_text(SHOWS_LINES.replace("PROMPT", prompt))
    opened = "<think>" if "OPEN" in more else ""
    words = [
        "--model",
        chat_folder(tmp_path, ENDS_TURNS.replace("OPEN", opened)),
        "--task",
        f"{tmp_path}/lines.py:Lines",
    ]
    run = loading.load(
        grpo.parse_config([*words, "--prompts_per_step", "1", *LENGTHS, *(w for w in more if w != "OPEN")])
    )
    for row in sft.draw_rows(run, 1)[0]:
        assert run.tokenizer.decode(row.completion_ids) == learned
        assert row.completion_ids[-1] in run.eos_ids


def test_a_model_that_diverges_is_not_written(tmp_path):
    words = [*SMALL, "--lr", "1e30", "--lr_schedule", "constant", "--steps", "5"]
    with pytest.raises(grpo.UsageError, match="has diverged, and is not written. Lower lr"):
        sft.sft(grpo.parse_config(words), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_grpo_refuses_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "check_model", lambda run, policy, sampler: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sft.sft(grpo.parse_config(SMALL), tmp_path / "out")


def test_a_folder_that_cannot_be_written_at_the_end_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()  # somebody made it meanwhile
    with pytest.raises(grpo.UsageError, match="the model cannot be written to .*out"):
        sft.sft(grpo.parse_config([*SMALL, "--steps", "1"]), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_signal_writes_the_model_as_it_is(tmp_path):
    line = [sys.executable, "-u", "-m", "harness.sft", *SMALL, "--steps", "100000", "--output", str(tmp_path / "out")]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen = ""
    while " 2/100000" not in seen:
        piece = process.stdout.read(1)
        assert piece, seen
        seen += piece
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the model is written as it is now" in said, said
    assert loading.load_model(str(tmp_path / "out"))


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "--output is needed"),
        (["--output", "."], ". exists already"),
        (["--output", "/proc/no/out"], "cannot be made"),
        (["--output", "out", "--steps", "0"], "steps is 0: there is nothing to train"),
        (["--output", "out", "--stepz", "1"], "there is no setting --stepz"),
        (["--output", "out", "--model", "nowhere"], "nowhere"),
        (["--output", "out", "--resume", "runs/x"], "runs/x is no run's folder"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_leaves_nothing(words, said, tmp_path):
    done = command(*SMALL, *[str(tmp_path / "out") if word == "out" else word for word in words])
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: "), done.stderr
    assert said in done.stderr and not (tmp_path / "out").exists() and "Traceback" not in done.stderr


def test_a_task_that_shows_nothing_is_named(tmp_path, monkeypatch):
    monkeypatch.delattr(ArithmeticTask, "demonstration")
    with pytest.raises(grpo.UsageError, match="ArithmeticTask has no method `demonstration"):
        sft.sft(grpo.parse_config(SMALL), tmp_path / "out")


def test_help_lists_the_settings():
    done = command("--help")
    assert (
        done.returncode == 0 and "python -m harness.sft --output FOLDER" in done.stdout and "--few_shot" in done.stdout
    )
