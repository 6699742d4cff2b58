"""The workshop: notebooks as built, run untouched and solved; its claims; each mistake and each bad function named."""

import json
import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parents[2] / "notebooks"
sys.path.insert(0, str(HERE))

import answers  # noqa: E402
import build  # noqa: E402
import experiments  # noqa: E402
import nbformat  # noqa: E402
import workshop  # noqa: E402
from exercises import EXERCISES, EXPLOITS, PROBLEM  # noqa: E402

import grpo  # noqa: E402

SOURCES = build.sources()
MISTAKES = [(name, text) for name, (_, mistakes) in EXERCISES.items() for text in mistakes]
NOISY = ("torchao", "torch/utils/_pytree", "real_accelerator")  # what torchao and DeepSpeed say when they are imported
by_name = dict(ids=lambda path: path.stem)


def exercises_of(notebook) -> list[str]:
    return [found[1] for c in notebook.cells if c.cell_type == "code" and (found := build.EXERCISE.search(c.source))]


def printed(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    lines = [line for o in outputs if o.get("name") == "stderr" for line in o["text"].splitlines()]
    unknown = [line for line in lines if not any(name in line for name in NOISY)]
    assert not unknown, "warnings, or a bar that was left"
    return "".join(output.get("text", "") for output in outputs)


# ==== What is committed ===============================================================================================


@pytest.mark.parametrize("source", SOURCES, **by_name)
def test_a_rebuild_changes_nothing(source):
    built = build.build(source)
    assert nbformat.writes(built).strip() == (HERE / f"{source.stem}.ipynb").read_text().strip()
    assert len(built.cells) <= 25 and len(exercises_of(built)) <= 4


@pytest.mark.parametrize("source", SOURCES, **by_name)
def test_a_solved_notebook_is_that_of_its_source_and_all_is_right_in_it(source):
    kept = nbformat.read(HERE / "solved" / f"{source.stem}.ipynb", as_version=4)
    solved = build.solve(build.build(source))
    assert [(c.id, c.source) for c in kept.cells] == [(c.id, c.source) for c in solved.cells]
    assert printed(kept).count(": right") == len(exercises_of(build.build(source)))
    assert "not yet" not in printed(kept) and "Error" not in printed(kept)
    assert sum("image/png" in str(c.get("outputs")) or "text/html" in str(c.get("outputs")) for c in kept.cells) >= 1


def test_the_hosted_notebook_is_that_of_its_source_and_has_a_badge_once_there_is_an_address(monkeypatch):
    built = nbformat.writes(build.build(build.HOSTED))
    assert built.strip() == (HERE / "colab_gpu.ipynb").read_text().strip()
    assert build.REPOSITORY or "colab-badge" not in built
    monkeypatch.setattr(build, "REPOSITORY", "https://github.com/someone/grpo")
    cells = build.build(build.HOSTED).cells
    address = "https://colab.research.google.com/github/someone/grpo/blob/main/notebooks/colab_gpu.ipynb"
    assert f"({address})" in cells[0].source and 'REPOSITORY = "https://github.com/someone/grpo"' in cells[1].source
    for source in SOURCES:  # those that can be opened in Colab find the files there, too
        text = "".join(cell.source for cell in build.build(source).cells)
        assert ('REPOSITORY = ""' in source.read_text()) == ("someone/grpo" in text)


FAKE_PIP = """
import shutil, sys
assert sys.argv[1:] == ["uninstall", "-q", "-y", "torchvision"], sys.argv
shutil.rmtree(FOLDER)
"""


def test_the_hosted_notebook_runs_on_a_cpu_with_a_tiny_model(qwen3_folder, tmp_path, monkeypatch):
    """Beside a torchvision that does not fit, as hosted notebooks have it, and a pip that takes it away."""
    (tmp_path / "grpo").symlink_to(HERE.parent)
    packages = tmp_path / "packages"
    for name in ("torchvision", "pip"):
        (packages / name).mkdir(parents=True)
    (packages / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms')")
    fake = FAKE_PIP.replace("FOLDER", repr(str(packages / "torchvision")))
    (packages / "pip" / "__init__.py").touch()
    (packages / "pip" / "__main__.py").write_text(fake)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    problems = [dict(question=f"Tom has {n} cats and 3 dogs.", answer=f"#### {n + 3}") for n in range(12)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    flags = {"device": "cpu", "vllm_sleep": "false", "steps": 2, "runs": str(tmp_path / "runs"), "eval_samples": 2}
    flags |= {"task_args.dataset": str(tmp_path / "problems.jsonl"), "task_args.eval_size": 2, "lora_rank": 4}
    flags |= {"max_prompt_tokens": 400, "max_completion_tokens": 8, "prompts_per_step": 2, "group_size": 2}
    notebook = build.build(build.HOSTED)
    cells = [cell.source for cell in notebook.cells]
    notebook.cells[1].source = re.sub("MODEL = .*", f"MODEL = {qwen3_folder!r}", cells[1])
    notebook.cells[1].source = re.sub("FLAGS = .*", f"FLAGS = {flags!r}", notebook.cells[1].source)
    assert notebook.cells[1].source != cells[1]
    build.execute(notebook, folder=tmp_path)
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "uninstall -q -y torchvision" in text and not (packages / "torchvision").exists()
    assert "no GPU" in text and "numbers are trained" in text and "2/2" in text and "The model is in" in text
    shown = [str(output.get("data")) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("iframe srcdoc" in data and "accuracy_sampled" in data for data in shown)
    with zipfile.ZipFile(tmp_path / "adapter.zip") as made:
        assert {"adapter_model.safetensors", "adapter_config.json"} <= set(made.namelist())


def test_hints_and_answers_are_folded_and_escaped():
    text = "Title\n\nHint 1, a question: a `x < y`?\n\nHint 2, the formula: `<b>`\n\nText\n\nAnswer: Yes."
    opened = '<details style="margin-bottom:0.7em"><summary>'
    assert build.fold(text) == (
        f"Title\n\n{opened}Hint 1, a question</summary>a <code>x &lt; y</code>?\n"
        f"{opened}Hint 2, the formula</summary><code>&lt;b&gt;</code></details></details>\n\nText\n\n"
        f"{opened}Answer</summary>Yes.</details>"
    )


# ==== Run All, and what the notebooks claim ===========================================================================


def measured(text: str) -> dict[str, float]:
    """What `compare` has printed."""
    return {name: float(value) for name, value in re.findall(r"^(\w+): .*, measured (\S+)$", text, re.M)}


def claims_of_notebook_1(text: str) -> None:
    assert 0.4 < measured(text)["pass_at_1"] < 0.7 < measured(text)["pass_at_8"]


def claims_of_notebook_2(text: str) -> None:
    assert measured(text)["noise_ratio"] > 1.2
    assert "loss -0.0000" in text or "loss +0.0000" in text


def claims_of_notebook_3(text: str) -> None:
    found = measured(text)
    assert found["gradient_good"] == 0 and found["gradient_bad"] == pytest.approx(1.5)
    assert 0.3 < found["share_of_negative_k1"] < 0.7


def claims_of_notebook_4(text: str) -> None:
    found = measured(text)
    assert found["reward"] > 0.65 and found["worked"] > 0.5
    differences = re.findall(r"largest difference (\S+)", text)
    assert len(differences) == 4 and max(map(float, differences)) < 1e-6, "the learner's run is grpo.py's"
    before, after = map(float, re.search(r"in no training: (\S+) → (\S+)", text).groups())
    assert before < 0.45 and after > 0.65


def claims_of_notebook_5(text: str) -> None:
    found = measured(text)
    assert found["dead_at_2"] > 0.7 > 0.6 > found["dead_at_16"] and found["pass_at_16"] > 0.8
    assert found["wrong_sequence"] > 25 and max(found["wrong_token"], found["wrong_constant"]) < 18


def claims_of_notebook_6(text: str) -> None:
    found = measured(text)
    assert found["reward"] > 2.5 and found["correct"] < 0.25
    assert found["repaired_correct"] > 0.5 and found["repaired_reward"] < 1
    table = [(float(a), float(b)) for a, b in re.findall(r"^ +(\d+\.\d\d) +(\d\.\d\d)  ", text, re.M)]
    assert len(table) == len(EXPLOITS) and sum(paid >= 1 for paid, _ in table) == len(table) - 2
    assert max(paid for _, paid in table) == 0.25


def claims_of_notebook_7(text: str) -> None:
    assert measured(text)["pass_at_1"] < 0.55 and measured(text)["last_step_that_gained"] <= 300
    assert 94 < measured(text)["rank_1"] < 96 and "Qwen2.5-3B     rank 16 trains  29.9 M numbers, 1.0%" in text


def claims_of(source: Path):
    return globals()[f"claims_of_notebook_{source.name[1]}"]


@pytest.mark.parametrize("source", SOURCES, **by_name)
def test_run_all_untouched(source):
    notebook = build.build(source)
    text = printed(build.execute(notebook))
    assert text.count("not written yet") == len(exercises_of(notebook))
    claims_of(source)(text)


WITH_EXERCISES = [source for source in SOURCES if exercises_of(build.build(source))]
THAT_TRAIN = [source for source in WITH_EXERCISES if source.name[:2] in ("04", "06")]  # for half a minute and more
SOLVED = [pytest.param(s, True, marks=pytest.mark.slow if s in THAT_TRAIN else (), id=s.stem) for s in WITH_EXERCISES]
SOLVED += [pytest.param(source, False, id=f"{source.stem}, few steps") for source in THAT_TRAIN]


@pytest.mark.parametrize("source, whole", SOLVED)
def test_run_all_solved_with_another_seed(source, whole):
    """Every check passes; and what the notebook claims holds, where it trains as long as it says."""
    solved = build.solve(build.build(source))
    for cell in solved.cells:
        cell.source = re.sub(r"^((?:STEPS, )?SEED = .*)\b0\b", r"\g<1>1", cell.source, flags=re.M)
        if not whole:
            cell.source = re.sub(r"STEPS, SEED = \d+", "STEPS, SEED = 6", cell.source)
            cell.source = re.sub(r"\bsteps=\d+", "steps=6", cell.source)
    text = printed(build.execute(solved))
    assert text.count(": right") == len(exercises_of(build.build(source))) and "not yet" not in text
    if whole:
        claims_of(source)(text)


def ends(arm: str, seed: int) -> tuple[float, float]:
    found = next(one for one in experiments.recorded(arm) if one["seed"] == seed)
    return found["first"]["accuracy_sampled"], found["last"]["accuracy_sampled"]


def train(arm: str, seed: int) -> tuple[float, float]:
    _, evaluations, _ = experiments.run(seed, 200, **experiments.ARMS[arm])
    return evaluations[0]["accuracy_sampled"], evaluations[-1]["accuracy_sampled"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("of", [ends, pytest.param(train, marks=pytest.mark.slow)])
def test_what_notebook_5_says_of_its_arms(of, seed):
    """Of the record; and, slow, of new runs: accuracies before and after."""
    base = of("base", seed)
    assert 0.33 < base[0] < 0.43 and base[1] > 0.72
    before, after = of("wrapped", seed)
    assert before < base[0] - 0.1 and after > 0.65, "worse before any training, and repaired by it"
    assert abs(of("no std", seed)[1] - base[1]) < 0.08, "no difference"
    for arm in ("G = 2", "G = 4", "G = 16"):
        assert abs(of(arm, seed)[1] - base[1]) < 0.12, "no difference at one budget"
    high, held = of("lr 3e-3", seed)[1], of("lr 3e-3, KL 0.1", seed)[1]
    assert high < 0.35 and held > high + 0.15, "the penalty holds it"
    assert of("lr 1e-2", seed)[1] < 0.15 and of("lr 1e-2, KL 0.1", seed)[1] < 0.2, "and here it does not"
    assert abs(of("KL 1", seed)[1] - base[0]) < 0.08, "too strong a penalty"
    before, after = of("cap 8", seed)
    assert after < before - 0.03, "worse than untrained"
    assert of("anywhere", seed)[1] > 0.7, "a leak that these seeds did not find"
    if of is ends:
        assert ends("anywhere", 2)[1] < 0.65, "and this one did"
        assert of("weak base", seed)[1] < 0.15


# ==== check ===========================================================================================================


@pytest.mark.parametrize("name, mistake", MISTAKES)
def test_a_classic_mistake_is_named(name, mistake):
    assert workshop.complaint(EXERCISES[name][1][mistake], name) == mistake


@pytest.mark.parametrize("name", ["group_advantages", "policy_loss", "kl_estimate", "token_weights"])
def test_a_plain_answer_is_what_grpo_computes(name, monkeypatch):
    plain = getattr(answers, name)
    monkeypatch.delattr(answers, name)
    assert workshop.answer(name) is getattr(grpo, name)
    assert workshop.complaint(plain, name) == ""


@pytest.mark.parametrize("name", list(EXERCISES))
def test_the_answers_are_right(name):
    assert workshop.complaint(workshop.answer(name), name) == ""
    assert len(EXERCISES[name][1]) >= 3


def test_the_exploits_are_paid_by_a_careless_verifier_only():
    strict = workshop.answer("repaired_reward")
    assert [strict(text, *PROBLEM) for text, _ in EXPLOITS.values()] == [paid for _, paid in EXPLOITS.values()]


def changed(name: str, change):
    """The right function, with its first output changed."""

    def function(*args, **kwargs):
        out = workshop.answer(name)(*args, **kwargs)
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(torch.as_tensor(out))

    return function


def raising(out):
    raise RuntimeError("sizes differ\nand more")


BAD = {
    "raises": (raising, r"^it raised RuntimeError: sizes differ \(on "),
    "none": (lambda out: None, r"^it returned (None|a NoneType, where a tensor or a number is wanted)"),
    "text": (lambda out: "12", r"^it returned a str, where a tensor or a number is wanted"),
    "list": (lambda out: out.tolist() if out.dim() else [0.5], r"^it returned a list, where a tensor"),
    "numpy": (lambda out: out.detach().numpy(), r"^it returned a ndarray, where a tensor"),
    "shape": (lambda out: torch.stack([out, out]), r"^it returned the shape \[2.*\], wanted is \["),
    "dtype": (lambda out: torch.ones_like(out, dtype=torch.bool) if out.dtype != torch.bool else out.double(),
              r"^it returned (the dtype torch\.\w+, wanted is torch\.|1 for every input)"),
    "constant": (torch.zeros_like, r"^it returned 0 for every input, also on "),
    "nan": (lambda out: out / 0 if out.is_floating_point() else out.double() / 0, r"not finite|the dtype"),
}  # fmt: skip


@pytest.mark.parametrize("bad", list(BAD))
@pytest.mark.parametrize("name", list(EXERCISES))
def test_a_bad_function_is_described(name, bad):
    change, message = BAD[bad]
    found = workshop.complaint(changed(name, change), name)
    assert re.search(message, found) and re.search(r"[( ]on ", found), found


@pytest.mark.parametrize("name", [name for name in EXERCISES if "detached" in str(EXERCISES[name][1])])
def test_a_detached_tensor_is_described(name):
    found = workshop.complaint(changed(name, torch.Tensor.detach), name)
    assert "detached" in found


def test_a_changed_input_is_described():
    def completion_mask(lengths):
        lengths -= 1
        return torch.arange(int(lengths.max()) + 1) <= lengths[:, None]

    assert "it changed its input" in workshop.complaint(completion_mask, "completion_mask")


def test_the_second_output_is_described():
    def marks_all(logps, old_logps, advantages, clip_low=0.2, clip_high=0.2, mask=None):
        loss, _ = grpo.policy_loss(logps, old_logps, advantages, clip_low, clip_high, mask)
        r = (logps - old_logps).exp()
        return loss, (r > 1 + clip_high).long() - (r < 1 - clip_low).long()

    def keeps_padding(logps, old_logps, advantages, clip_low=0.2, clip_high=0.2, mask=None):
        loss, _ = grpo.policy_loss(logps, old_logps, advantages, clip_low, clip_high, mask)
        return loss, grpo.policy_loss(logps, old_logps, advantages, clip_low, clip_high)[1]

    for function in (marks_all, keeps_padding):
        assert "the loss is right, `clipped` is not" in workshop.complaint(function, "policy_loss")


def right_but(name: str):
    """The library's function under another identity, as a learner's would be."""

    def function(*args, **kwargs):
        return workshop.answer(name)(*args, **kwargs)

    function.__name__ = name
    return function


def test_check_goes_on_with_the_library_and_does_not_call_that_right(capsys):
    def kl_estimate(logps, ref_logps, kind="k3"):
        raise NotImplementedError

    kl_estimate = workshop.check(kl_estimate)
    assert kl_estimate is workshop.answer("kl_estimate")
    assert "not written yet" in capsys.readouterr().out
    workshop.check(kl_estimate)  # the cell is run a second time
    assert "the library's function already" in capsys.readouterr().out


def test_check_says_when_it_compared_gradients(capsys):
    for name in ("kl_estimate", "completion_mask", "group_advantages"):
        workshop.check(right_but(name))
    said = ["kl_estimate: right, values and gradients", "completion_mask: right", "group_advantages: right"]
    assert capsys.readouterr().out.splitlines() == said


def test_a_guess_is_kept_and_a_bad_one_described(capsys):
    workshop.predict(share=0.25, other=None, wrong="big")
    workshop.compare(share=0.5, other=1.0)
    said = ["share: noted, 0.25", "other: put a number in the place of None", "wrong: 'big' is no number"]
    said += ["share: your guess 0.25, measured 0.5", "other: no guess, measured 1"]
    assert capsys.readouterr().out.splitlines() == said
