"""What a run asks of the CPU: threads, and products that repeat. In processes of their own: the settings are global."""

import os
import subprocess
import sys

import pytest
from conftest import PRETRAINED

CODE = f"""
import os, torch, transformers
from harness import loading
tiny, larger = loading.load_model({PRETRAINED!r})[0], torch.nn.Linear(1000, 1000)
for model, asked in ((tiny, None), (larger, None), (tiny, "2")):
    torch.set_num_threads(3)
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ |= {{"OMP_NUM_THREADS": asked}} if asked else {{}}
    loading.limit_threads(model)
    print(torch.get_num_threads())
"""


def test_a_tiny_model_takes_one_thread_unless_told_otherwise():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "3", "3"]


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
    "start, environment, mode",
    [
        ("import torch, grpo", {}, "AUTO"),
        ("import mathformer", {}, "AUTO"),
        ("import grpo, mathformer", SLOW_CPU | {"MKL_CBWR": "COMPATIBLE"}, "COMPATIBLE"),  # what a user asks for holds
    ],
)
def test_a_product_repeats_wherever_its_operands_lie(start, environment, mode):
    """What "to the last digit" rests on: a run that is stopped and resumed has its tensors at other places."""
    clean = {key: value for key, value in os.environ.items() if key != "MKL_CBWR"}
    code = f"import os\n{start}\n{PRODUCTS}\nprint(os.environ['MKL_CBWR'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", mode]
