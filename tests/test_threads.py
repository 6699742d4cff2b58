"""What a run asks of the CPU: threads, and products that repeat. In processes of their own: the settings are global."""

import os
import subprocess
import sys

import pytest
from conftest import PRETRAINED

CODE = """
import torch, transformers, loading
torch.set_num_threads(3)
{make}
loading.limit_threads(model)
print(torch.get_num_threads())
"""
TINY = f"model, _ = loading.load_model({PRETRAINED!r})"
LARGER = "model = torch.nn.Linear(1000, 1000)"


CASES = [(TINY, {}, 1), (LARGER, {}, 3), (TINY, {"OMP_NUM_THREADS": "2"}, 3)]


@pytest.mark.parametrize("make, environment, threads", CASES)
def test_a_tiny_model_takes_one_thread_unless_told_otherwise(make, environment, threads):
    clean = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", CODE.format(make=make)]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(threads)


# The same products, with an operand at other places in memory: there, MKL left to itself rounds otherwise on some CPUs.
PRODUCTS = """
import torch
torch.set_num_threads(1)
generator, differ = torch.Generator().manual_seed(0), 0
for rows in (1, 3, 7, 13, 31, 100):
    for width in (48, 64, 192):
        a, w = torch.randn(rows, width, generator=generator), torch.randn(64, width, generator=generator)
        for offset in (1, 2, 5, 8):
            moved = torch.empty(rows * width + 8)[offset : offset + rows * width].view(rows, width).copy_(a)
            differ += not torch.equal(moved @ w.T, a @ w.T)
print(differ)
"""
SLOW_CPU = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}


@pytest.mark.parametrize(
    "start, cpu", [("import torch, grpo", {}), ("import mathformer", {}), ("import grpo", SLOW_CPU)]
)
def test_a_product_repeats_wherever_its_operands_lie(start, cpu):
    """What "to the last digit" rests on: a run that is stopped and resumed has its tensors at other places."""
    clean = {key: value for key, value in os.environ.items() if key != "MKL_CBWR"}
    done = subprocess.run(
        [sys.executable, "-c", f"{start}\n{PRODUCTS}"], env=clean | cpu, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0"


def test_what_a_user_asks_of_mkl_holds():
    code = "import os, grpo, mathformer; print(os.environ['MKL_CBWR'])"
    environment = os.environ | {"MKL_CBWR": "COMPATIBLE"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "COMPATIBLE"
