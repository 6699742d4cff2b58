"""Each script of benchmarks/ runs: the least work that it can be asked for, and no look at how long it takes.

Nearly all of that would be the import of torch, transformers and TRL, 4 to 8 seconds in each of some 30 processes. So
the scripts run, with the programs that they start, in forks of one process (`serve`) that has these imported, but
nothing of this repository.
"""

import importlib.util
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
NO_PROGRAMS = {"leaky_task", "common", "shapes", "gpu_profile", "fp16_on_cpu"}
ONE_RUN = ["--steps", "1", "--jobs", "1"]
# script: its arguments, in which OUT is the test's folder, and CHAT a chat model's; and the files that it writes there
SMALLEST = {
    "against_trl": (["--tiny", "--pairs", "1", "--steps", "4", "--out", "OUT/a.md"], ["a.md"]),
    "arithmetic_seeds": (["--seeds", "0", "--steps", "1", "--out", "OUT/a.md"], ["a.md", "arithmetic_seed0.png"]),
    "compare_commits": ([".", ".", "--only", "maxrl"], []),
    "draws": (["--tiny", "--out", "OUT/d.md"], ["d.md"]),
    "failures": ([*ONE_RUN, "--only", "healthy", "--out", "OUT/f.md"], ["f.md"]),
    "gpu": (["--tiny", "--steps", "1", "--out", "OUT"], ["gpu_tiny.json", "gpu_tiny.md"]),
    "hostile_answers": (["--turns", "1", "--answers", "8", "--out", "OUT/h.md"], ["h.md"]),
    "long_run": (
        ["--steps", "1", "--out", "OUT/log"],
        [f"log/{name}" for name in ("config.yaml", "eval.jsonl", "metrics.jsonl", "rollouts.jsonl")],
    ),
    "lora": ([*ONE_RUN, "--seeds", "0", "--arms", "rank 1, 0.001", "--out", "OUT/l.md"], ["l.md", "l.png"]),
    "lora_sampling": (
        ["--model", "CHAT", "--turns", "1", "--ranks", "4", "--ways", "merged", "--precisions", "no"]
        + ["--out", "OUT/l.md"],
        ["l.md"],
    ),
    "mathformer_vs_bloom": (["--tiny", "--turns", "1", "--threads", "1", "--sizes", "tiny"], []),
    "memory_flat": (["--steps", "1", "--out", "OUT/m.md"], ["m.md"]),
    "page_and_program": (["--tiny", "--seeds", "0", "--out", "OUT/p.md"], ["p.md"]),
    "pipeline": (["--tiny", "--seeds", "0", "--work", "OUT/work", "--out", "OUT/p.md"], ["p.md"]),
    "quarter_hour": (["--tiny", "--out", "OUT"], ["quarter_hour.json", "gpu_tiny.md", "gpu_tiny_profile.jsonl"]),
    "rl_flags": (
        [*ONE_RUN, "--seeds", "0", "--variants", "the defaults", "--max_gen_len", "4", "--out", "OUT/r.md"],
        ["r.md"],
    ),
    "samplers": (["--tiny", "--out", "OUT/s.md"], ["s.md"]),
    "scaling": (["--tiny", "--out", "OUT/s.md"], ["s.md"]),
    "smollm2": (
        ["--tiny", "--model", "CHAT", "--arms", "strict", "--seeds", "0", "--out", "OUT"],
        ["table.md", *(f"strict-seed0-{name}" for name in ("config.yaml", "answers.jsonl", "five.jsonl"))],
    ),
    "step_time": (["--tiny", "--out", "OUT/s.md"], ["s.md"]),
    "tiers": ([*ONE_RUN, "--seeds", "0", "--tiers", "fp16, emulated", "--out", "OUT/t.md"], ["t.md"]),
    "time_to_accuracy": (["--turns", "1", "--steps", "1", "--out", "OUT/t.md"], ["t.md"]),
    "compare_variants": (
        [*ONE_RUN, "--seeds", "0", "--variants", "the defaults", "--out", "OUT/v.md"],
        ["v.md", "v.png"],
    ),
    "staleness": ([*ONE_RUN, "--seeds", "0", "--arms", "1, nothing", "--out", "OUT/s.md"], ["s.md", "s.png"]),
    "workshop": ([*ONE_RUN, "--seeds", "0", "--arms", "base", "--out", "OUT/w.md"], ["w.md", "w.jsonl"]),
}
NEED_TRL = {"against_trl", "quarter_hour"}
TRL_IS_THERE = importlib.util.find_spec("trl") is not None  # it needs Python 3.11
SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SETTINGS |= {"GRPO_TASK_ARGS": '{"eval_size": 2}', "GRPO_GROUP_SIZE": "4"}  # what grpo.py reads where no flag says it
CLIENT = """#!{python} -SE
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({path!r})
socket.send_fds(server, [json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()], [0, 1, 2])
sys.exit(int(server.recv(16) or 1))
"""


def serve(path: str) -> None:
    import multiprocessing.spawn  # noqa: F401  (remembers the true interpreter, which it starts)

    import datasets  # noqa: F401
    import jsonargparse  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import torch.distributed.tensor  # noqa: F401
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    if TRL_IS_THERE:
        from trl import GRPOTrainer  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(path)
    server.listen()
    server.settimeout(600)  # so that it ends, should pytest be killed
    while True:
        client, _ = server.accept()
        message, streams, *_ = socket.recv_fds(client, 1 << 20, 3)
        if os.fork() == 0:
            server.close()
            for i, stream in enumerate(streams):
                os.dup2(stream, i)
            code = run(*json.loads(message))
            client.send(str(code).encode())
            os._exit(code)
        for descriptor in (*streams, client.detach()):
            os.close(descriptor)


def run(argv: list[str], folder: str, environment: dict[str, str]) -> int:
    """What `python` does with these arguments, `FILE ...` or `-m MODULE ...`; its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable, *sys.argv = argv
    try:
        if sys.argv[0] == "-m":
            sys.argv, sys.path[0] = sys.argv[1:], folder
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        print(end.code if code == 1 else "", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter that has imported the libraries already; where there is no such fork, the usual one."""
    if sys.platform != "linux":
        yield sys.executable
        return
    folder = tmp_path_factory.mktemp("python")
    path, client = str(folder / "socket"), folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, path=path))
    client.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, path], env=os.environ | SETTINGS)
    while not Path(path).exists():
        assert server.poll() is None
        time.sleep(0.1)
    yield str(client)
    server.kill()
    server.wait()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("script", sorted({path.stem for path in BENCHMARKS.glob("*.py")} - NO_PROGRAMS))
def test_a_benchmark_runs(script, python, tmp_path, qwen3_folder):
    assert script in SMALLEST, f"say in SMALLEST how benchmarks/{script}.py does the least work"
    if script in NEED_TRL and not TRL_IS_THERE:
        pytest.skip("TRL is not installed")
    if script == "lora_sampling" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    arguments, files = SMALLEST[script]
    recorded = contents(BENCHMARKS / "results")
    arguments = [word.replace("OUT", str(tmp_path)).replace("CHAT", qwen3_folder) for word in arguments]
    command = [python, f"benchmarks/{script}.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | SETTINGS, capture_output=True, text=True)
    said = f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    assert done.returncode == 0, said
    for file in files:
        assert (tmp_path / file).stat().st_size, said
    if not files:
        assert "| --- |" in done.stdout, said
    assert contents(BENCHMARKS / "results") == recorded


def test_two_commits_that_compute_something_else_are_told_apart(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from compare_commits import difference

    row = {"step": 1, "reward": 0.5}
    assert difference([row, row], [row, dict(row)]) == ""
    assert difference([row], [row, row]) == "1 and 2 rows"
    assert difference([row, row], [row, row | {"reward": 0.25}]) == "row 2, reward: 0.5 and 0.25"
    assert difference([row], [row | {"loss": 0.0}]) == "row 1 has other keys"


if __name__ == "__main__":
    serve(sys.argv[1])
