"""What benchmarks/gpu.py does besides running: kinds of kernels, limits, small cards."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu
import gpu_profile
import quarter_hour

from harness import memory


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd>", "attention"),
        ("sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x32_warpgroup", "head"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float>", "head"),
        ("nvjet_sm90_tst_192x192_64x3_1x2_h_bz_coopB_NTN", "products of the layers"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel>", "copies and casts"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::BUnaryFunctor>", "elementwise"),
    ],
)
def test_kernels_of_an_h100_have_kinds(kernel, kind):
    assert gpu_profile.kind_of(kernel) == kind


@pytest.mark.parametrize("wrote, found", [("partial.json", {"steps": [1]}), ("nothing", {"failed": "no step ended"})])
def test_at_its_limit_a_program_has_what_it_did_until_then(wrote, found, tmp_path, monkeypatch):
    slow = tmp_path / "slow.py"
    slow.write_text(f"""
import pathlib, sys, time
pathlib.Path(sys.argv[3]).with_name({wrote!r}).write_text('{{"steps": [1]}}')
time.sleep(600)
""")
    monkeypatch.setattr(gpu, "__file__", str(slow))
    result = gpu.child("ours", limit=3)
    assert result == found or result["failed"].startswith(found["failed"])


def test_a_card_can_be_made_smaller(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 80e9)
    gpu.only(24)
    assert memory.free_memory(torch.device("cpu")) == 24e9
    monkeypatch.setattr(memory, "free_memory", lambda device: 8e9)
    gpu.only(24)
    assert memory.free_memory(torch.device("cpu")) == 8e9


def test_the_share_of_padding():
    import grpo

    rows = [grpo.Rollout([1] * p, [1] * c, [0.0] * c, False) for p, c in ((2, 2), (2, 6), (2, 6))]
    assert gpu_profile.padding(rows, 24) == pytest.approx(1 - 20 / 24)
    assert gpu_profile.padding(rows[1:], 8) == 0


def test_the_docs_have_the_commands_of_the_quarter_hour():
    docs = (Path(gpu.__file__).parents[1] / "docs" / "gpu.md").read_text()
    rows = [f"| {task.seconds} | `{task.name.removeprefix('benchmarks/gpu.py ')}` |" for task in quarter_hour.TASKS]
    found = [row for row in docs.splitlines() if " | `--shapes" in row or " | `grpo.py" in row]
    assert found == [next(line for line in docs.splitlines() if line.startswith(row)) for row in rows]
