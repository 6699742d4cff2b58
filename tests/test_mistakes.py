"""What people mistype, and the one line that each of these gets. Nearly all before torch is loaded.

The commands run in forks of one process in which an import of torch fails: an answer that needed it would not come.
"""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "bad.yaml": "lr: 1e-3\n  steps: [1,\n",
    "list.yaml": "- 1\n- 2\n",
    "unknown.yaml": "grup_size: 3\n",
    "wrong.yaml": "model: mathformer/pretrained\ntask: arithmetic\nsteps: many\n",
    "empty.yaml": "",
    "no_yaml.txt": "hello, world\n",
    "bad_task.py": "class Task:\n    def train(self, rng, step):\n        pass\n",
    "my_base/config.json": "{}",
    "empty_folder/x": "",
    "capitals.jsonl": "{}\n",
}
# (command, what the line has)
AT_ONCE = [
    # a name that does not exist
    ("grpo.py --grop_size 4", "no setting --grop_size; did you mean --group_size?"),
    ("grpo.py --step 3", "did you mean --steps?"),
    ("grpo.py --loss token", "did you mean --loss_weight?"),
    ("grpo.py --temp 1", "did you mean --temperature?"),
    ("grpo.py --kl 0.1", "no setting --kl; did you mean --kl_"),
    ("grpo.py --trackers wandbb", "here it is --report_to"),
    ("grpo.py --xyzzy 3", "if it is an argument of the task: --task_args.xyzzy"),
    ("grpo.py --eval_size 0", "here it is --task_args.eval_size"),
    ("grpo.py --group-size 4", "did you mean --group_size?"),
    ("grpo.py --Group_size 4", "did you mean --group_size?"),
    ("grpo.py --group_size.x 4", "no setting --group_size.x"),
    # what other projects call it
    ("grpo.py --learning_rate 1e-3", "here it is --lr"),
    ("grpo.py --num_generations 4", "here it is --group_size"),
    ("grpo.py --beta 0.04", "here it is --kl_coef"),
    ("grpo.py --epsilon 0.2", "here it is --clip_low and --clip_high"),
    ("grpo.py --epsilon_high 0.28", "here it is --clip_high"),
    ("grpo.py --max_completion_length 64", "here it is --max_completion_tokens"),
    ("grpo.py --max_gen_len 64", "here it is --max_completion_tokens"),
    ("grpo.py --loss_type dapo", "here it is --loss_weight"),
    ("grpo.py --per_device_train_batch_size 8", "here it is --tokens_per_microbatch"),
    ("grpo.py --num_iterations 2", "here it is --epochs"),
    ("grpo.py --scale_rewards group", "here it is --advantage"),
    ("grpo.py --KL_COEFFICIENT 0.1", "here it is --kl_coef"),
    ("grpo.py --batch_size 32", "here it is --prompts_per_step"),
    ("grpo.py --output_dir out", "here it is --runs"),
    # a value of the wrong kind
    ("grpo.py --group_size four", "group_size is 'four', it must be a whole number"),
    ("grpo.py --steps 1.5", "steps is '1.5', it must be a whole number"),
    ("grpo.py --seed abc", "seed is 'abc', it must be a whole number"),
    ("grpo.py --lr 1e-3x", "lr is '1e-3x', it must be a number"),
    ("grpo.py --lr nan", "lr is 'nan', it must be"),
    ("grpo.py --advantage gpro", "one of grpo, dr_grpo, rloo, batch, maxrl; did you mean grpo?"),
    ("grpo.py --sampler vlm", "one of auto, vllm, torch, server; did you mean vllm?"),
    ("grpo.py --device gpu", "one of auto, cpu, cuda, mps; did you mean cuda?"),
    ("grpo.py --precision fp8", "one of auto, fp32, bf16"),
    ("grpo.py --vllm_sleep maybe", "vllm_sleep is 'maybe', it must be true or false"),
    ("grpo.py --task_args foo", "task_args is 'foo', it must be names and values"),
    ("grpo.py --group_size=", "group_size is '', it must be a whole number"),
    ("grpo.py --steps", "--steps needs a value, a whole number"),
    ("grpo.py --lr --seed 1", "--lr needs a value, a number"),
    # a value that is not allowed
    ("grpo.py --group_size 0", "group_size is 0, it must be 2 or more"),
    ("grpo.py --group_size 1", "there is nothing to compare it with"),
    ("grpo.py --group_size -3", "group_size is -3, it must be 2 or more"),
    ("grpo.py --lr -1", "lr is -1.0, it must be greater than 0"),
    ("grpo.py --steps -1", "steps is -1, it must be 0 or more"),
    ("grpo.py --seed -1", "seed is -1, it must be 0 or more"),
    ("grpo.py --temperature 0", "temperature is 0.0, it must be greater than 0"),
    ("grpo.py --temperature -1", "temperature is -1.0, it must be greater than 0"),
    ("grpo.py --top_p 0", "top_p is 0.0, it must be greater than 0"),
    ("grpo.py --top_p 1.5", "top_p is 1.5, it must be at most 1"),
    ("grpo.py --top_k -2", "top_k is -2, it must be 0 or more"),
    ("grpo.py --kl_coef -0.1", "kl_coef is -0.1, it must be 0 or more"),
    ("grpo.py --max_completion_tokens 0", "max_completion_tokens is 0, it must be 1 or more"),
    ("grpo.py --prompts_per_step 0", "prompts_per_step is 0, it must be 1 or more"),
    ("grpo.py --epochs 0", "epochs is 0, it must be 1 or more"),
    ("grpo.py --minibatches 1000", "minibatches is 1000, it must divide the 256 completions of a step"),
    ("grpo.py --kl_target 0.1", "kl_target changes kl_coef by factors"),
    ("grpo.py --reflection_words [(]", "reflection_words has '(', which is no regular expression"),
    # words that stand alone
    ("grpo.py configs/arithmetic.yaml", "did you mean --config configs/arithmetic.yaml?"),
    ("grpo.py train", "there is no command 'train'"),
    ("grpo.py steps 3", "did you mean --steps?"),
    ("grpo.py -steps 3", "did you mean --steps?"),
    ("grpo.py 3", "'3' stands alone: a setting is written --name value"),
    # files of settings
    ("grpo.py --config", "--config needs a value"),
    ("grpo.py --config configs/aritmetic.yaml", "there is no file configs/aritmetic.yaml; did you mean arithmetic?"),
    ("grpo.py --config configs", "there is no file configs"),
    ("grpo.py --config bad.yaml", "bad.yaml, line 2: "),
    ("grpo.py --config list.yaml", "list.yaml is no file of settings, which are lines `name: value`"),
    ("grpo.py --config empty.yaml", "empty.yaml is no file of settings"),
    ("grpo.py --config no_yaml.txt", "no_yaml.txt is no file of settings"),
    ("grpo.py --config unknown.yaml", "unknown.yaml: there is no setting grup_size; did you mean group_size?"),
    ("grpo.py --config wrong.yaml", "steps is 'many', it must be a whole number"),
    ("grpo.py --config ROOT/configs/variants/dapo.yaml", "it goes on top of a recipe, as in --config configs/"),
    # folders
    ("grpo.py --resume runs/none", "runs/none is no run's folder: there is no config.yaml in it"),
    ("grpo.py --resume .", ". is no run's folder"),
    ("grpo.py --resume . --config bad.yaml", "leave --config out"),
    ("grpo.py --runs /proc/x", "the run's folder cannot be made in /proc"),
    ("grpo.py --runs bad.yaml", "the run's folder cannot be made: bad.yaml is a file"),
    # model and task
    ("grpo.py --task countdow", "unknown task 'countdow'; did you mean countdown?"),
    ("grpo.py --task chess", "unknown task 'chess'; built in: arithmetic, countdown, gsm8k, math"),
    ("grpo.py --task bad_task.py", "the class is missing: bad_task.py:Task"),
    ("grpo.py --task bad_tsk.py:Task", "there is no file bad_tsk.py; did you mean bad_task.py?"),
    ("grpo.py --task countdown", "--model is needed beside --task, as in --model Qwen/"),
    ("grpo.py --model gpt2", "--task is needed beside --model, as in --model gpt2 --task countdown"),
    ("grpo.py --model mathformer/pretrained", "this model goes with --task arithmetic"),
    ("grpo.py --model ./my_bas", "there is no such file or folder; did you mean my_base?"),
    ("grpo.py --model ./my_bas --task arithmetic", "there is no such file or folder; did you mean my_base?"),
    ("grpo.py --model no_yaml.txt --task arithmetic", "is no model's folder: there is no config.json in it"),
    ("grpo.py --model empty_folder --task arithmetic", "is no model's folder: there is no config.json in it"),
    ("grpo.py --model runs/x/final --task arithmetic", "there is no such file or folder"),
    # a recipe for a GPU, on a machine without one
    ("grpo.py --config ROOT/configs/countdown-3b.yaml", "device is cuda, and this machine has no GPU for it"),
    # the views
    ("-m view", "there is no view '': take report or play"),
    ("-m view raport", "there is no view 'raport': take report or play"),
    ("-m view report", "the following arguments are required: RUN"),
    ("-m view report nope", "there is no folder nope"),
    ("-m view report .", ". is no folder of a run"),
    ("-m view report . --max_rollouts few", "argument --max_rollouts: invalid int value: 'few'"),
    ("-m view play", "the following arguments are required: run"),
    ("-m view play nope", "nope is no run's folder: there is no config.yaml in it"),
    ("-m view play nope --sample", "--sample"),
]
# what has torch loaded by then: the package's import does
LATER = [
    ("mathformer.train --modelsize huge --output x", "modelsize"),
    ("mathformer.train", "output"),
    ("mathformer.train --stepps 3", "there is no setting --stepps; did you mean --steps?"),
    ("mathformer.train_rl", "--checkpoint is needed: folder of the pretrained model"),
    ("mathformer.train_rl --lrr 1 --checkpoint x", "there is no setting --lrr; did you mean --lr?"),
    ("mathformer.evaluate", "--checkpoint is needed"),
    ("mathformer.evaluate nope", "'nope' stands alone"),
    ("mathformer.evaluate --checkpoint ./nope", "./nope"),
]
SERVER = """
import io, json, os, runpy, sys, traceback
import jsonargparse, yaml
from harness import command_line
sys.modules["torch"] = None  # an import of it fails
command_line.GPUS = ()
root = sys.argv[1]
for line in sys.stdin:
    words, environment = json.loads(line)
    reader, writer = os.pipe()
    if not os.fork():
        os.dup2(writer, 1), os.dup2(writer, 2)
        os.environ.update(environment)
        sys.argv, status = words, 0
        try:
            if words[0] == "-m":
                sys.argv = words[1:]
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(os.path.join(root, words[0]), run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            print(end.code if isinstance(end.code, str) else "", end="")
        except BaseException:
            status = 99
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    os.close(writer)
    said = open(reader, encoding="utf-8").read()
    print(json.dumps([os.waitstatus_to_exitcode(os.wait()[1]), said]), flush=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "configs").symlink_to(ROOT / "configs")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRPO_")} | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", SERVER, str(ROOT)], cwd=folder, env=environment, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # fmt: skip
        yield process
        process.stdin.close()


def ask(server, command: str, **environment: str) -> tuple[int, str]:
    """Exit status and output of the command, from which torch cannot be imported."""
    words = [word.replace("ROOT", str(ROOT)) for word in command.split()]
    server.stdin.write(json.dumps([words, environment]) + "\n")
    server.stdin.flush()
    status, said = json.loads(server.stdout.readline())
    return status, said


@pytest.mark.parametrize("command, said", AT_ONCE, ids=[command for command, _ in AT_ONCE])
def test_a_mistake_is_answered_in_one_line_before_torch_is_loaded(command, said, server):
    status, line = ask(server, command)
    assert line.startswith("error: ") and len(line.strip().splitlines()) == 1, line
    assert said in line
    assert status == 1


@pytest.mark.parametrize("command, said", LATER, ids=[command for command, _ in LATER])
def test_a_mistake_in_a_command_of_the_small_model_is_answered_in_one_line(command, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    module, *words = command.split()
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(SystemExit) as end, contextlib.redirect_stdout(io.StringIO()):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert str(end.value.code).startswith("error: ") and "\n" not in end.value.code and said in end.value.code


def test_there_are_enough_of_them():
    assert len({command for command, _ in AT_ONCE + LATER}) >= 80


def test_a_variable_of_the_environment_that_sets_nothing_is_refused(server):
    assert "the environment sets GRPO_LERNING_RATE" in ask(server, "grpo.py", GRPO_LERNING_RATE="1")[1]
    status, line = ask(server, "grpo.py", GRPO_STEPS="few")
    assert status == 1 and "steps is 'few', it must be a whole number" in line


def test_a_model_of_the_hub_that_cannot_be_had_is_named_at_once(server, tmp_path):
    flags = "grpo.py --model org/some-model --task countdown"
    cache = dict(HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path))
    status, line = ask(server, flags, **cache)
    assert status == 1 and line.startswith("error: model 'org/some-model' is no folder here and not in the cache")
    assert "`hf download org/some-model --local-dir FOLDER`" in line and "HF_HUB_OFFLINE" in line
    snapshot = tmp_path / "models--org--some-model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--org--some-model" / "refs").mkdir()
    (tmp_path / "models--org--some-model" / "refs" / "main").write_text("abc")
    assert ask(server, flags, **cache)[0] == 99, "what is in the cache goes on to load torch"


@pytest.mark.parametrize("model", ["org/some-model", "./gone"])
def test_a_run_goes_on_without_the_model_that_it_began_with(model, server, tmp_path):
    """Its checkpoint has all of it."""
    (tmp_path / "config.yaml").write_text(f"model: {model}\ntask: countdown\nruns: {tmp_path}\n")
    assert ask(server, f"grpo.py --resume {tmp_path}", HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path))[0] == 99


def test_without_a_network_the_hub_is_not_asked_for_half_a_minute(monkeypatch):
    from huggingface_hub import constants

    from tasks import names

    asked = []

    def refuse(address, timeout):
        asked.append((address, timeout))
        raise OSError("no network")

    for name in list(os.environ):
        if name.upper() in ("HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr(names.socket, "create_connection", refuse)
    names.ask_the_hub_only_if_it_is_there()
    assert constants.HF_HUB_OFFLINE and asked == [(("hub.example", 443), 3)]
    names.ask_the_hub_only_if_it_is_there()
    assert len(asked) == 1, "it is known by then"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("https_proxy", "http://proxy:1")
    names.ask_the_hub_only_if_it_is_there()
    assert not constants.HF_HUB_OFFLINE and len(asked) == 1, "a proxy may reach it"


def test_what_is_right_goes_on_to_load_torch(server):
    """So an answer without torch is no accident."""
    for flags in ("", "--steps 3 --offload_reference --seed=1", "--config configs/arithmetic.yaml"):
        status, said = ask(server, f"grpo.py {flags}")
        assert status == 99 and "import of torch halted" in said, said


def test_help_is_there_at_once_in_groups_and_short(server):
    status, said = ask(server, "grpo.py --help", COLUMNS="100")
    lines = said.splitlines()
    assert status == 0
    assert [line for line in lines if line and line[0] != " " and " " in line][0] == (
        "usage: python grpo.py [--config FILE ...] [--SETTING VALUE ...]"
    )
    groups = ["Model and task", "Sampling", "The loss", "Optimizer", "Evaluation", "What is kept and shown"]
    assert [line for line in lines if line in groups] == groups
    for word in ("Literal", "typing", "type:", "default:"):
        assert word not in said
    starts = [i for i, line in enumerate(lines) if line.startswith("  --")] + [len(lines)]
    assert all(end - start <= 4 for start, end in zip(starts, starts[1:], strict=False)) and len(starts) > 55
    assert max(map(len, lines)) <= 100
    assert ask(server, "grpo.py --version")[1].strip() == "2026.11.27"


def test_a_flag_that_is_true_or_false_may_stand_alone():
    from harness.command_line import parse_config

    assert parse_config(["--offload_reference", "--steps", "3"]).offload_reference
    assert parse_config(["--steps=3", "--mask_truncated"]).mask_truncated
    assert not parse_config(["--mask_truncated", "false"]).mask_truncated


def test_an_old_python_is_named_before_anything_else_is_imported(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match="error: Python 3.10 or newer is needed"):
        runpy.run_path(str(ROOT / "harness" / "__init__.py"))
