"""How many threads a run takes on a CPU. In processes of their own: the number is a global setting of torch."""

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
