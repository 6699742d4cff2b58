"""`python grpo.py` in fp16 on a CPU, to measure what rounding does; slow, and for nothing else.

    python benchmarks/fp16_on_cpu.py --steps 10

On a CPU, accelerate computes in float32 where fp16 was asked for. Here it gets torch's own autocast and loss scaler.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("MKL_CBWR", "AUTO")

import torch
from accelerate import Accelerator

import grpo
from harness import devices


class Fp16OnCpu(Accelerator):
    first_scale = 2.0**16  # as on a GPU

    def __init__(self, **settings):
        super().__init__(**settings)
        self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=self.first_scale)


if __name__ == "__main__":
    devices.Accelerator, devices.choose_precision = Fp16OnCpu, lambda config: "fp16"
    grpo.main()
