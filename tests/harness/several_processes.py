"""What tests/harness/test_parallel.py starts in several processes: updates on rollouts that each of them has.

    export PYTHONPATH=.:tests:tests/harness
    accelerate launch --config_file configs/accelerate/ddp.yaml tests/harness/several_processes.py OUT fp32

Writes to OUT, for each case, the weights after three updates, the metrics of the last, and log-probs.
"""

import sys

import torch
from accelerate import PartialState
from conftest import SHAPE, other_model, random_rollouts, with_adapters

import grpo
from harness import devices, lora, optimizers, parallel

GRPO = dict(tokens_per_microbatch=40)  # five to seven microbatches in all
CASES = {  # settings of the run, groups of rollouts
    "uneven shares": (GRPO, 4),
    "one microbatch each": (dict(tokens_per_microbatch=4096), 4),
    "minibatches and a KL": (GRPO | dict(minibatches=2, kl_coef=0.01, loss_weight="sequence"), 3),
    "sequence ratio": (GRPO | dict(ratio="sequence", entropy_coef=0.01, loss_weight="constant"), 3),
    "nothing to learn": (GRPO, 1),
    "adapters": (GRPO | dict(lora_rank=4, kl_coef=0.01), 3),
    "8-bit moments": (GRPO | dict(optimizer="adamw_8bit"), 4),
    "moments on the CPU": (GRPO | dict(optimizer="adamw_offload"), 4),
}

LR = 1e-4
WHOLE_ONLY = ("8-bit moments", "moments on the CPU")  # not with FSDP or DeepSpeed


def rows(case: str) -> list[grpo.Rollout]:
    rollouts = random_rollouts(SHAPE["vocab_size"], CASES.get(case, (GRPO, 3))[1])
    return rollouts[1:] if case == "uneven shares" else rollouts  # 11 of them live


def trained(case: str, accelerator, config: grpo.Config) -> dict:
    model = other_model("qwen2")
    if config.lora_rank:
        with_adapters(model, config, accelerator.mixed_precision)
    policy = grpo.Policy(model, entropy_gradient=config.entropy_coef > 0)
    optimizer = optimizers.make_optimizer(policy, config, accelerator)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    rollouts = rows(case)
    if config.lora_rank:  # before any other pass, as in a run with the torch sampler
        grpo.add_logps("ref_logps", lora.WithoutAdapters(policy), rollouts, accelerator, config)
    grpo.add_logps("old_logps", policy, rollouts, accelerator, config)
    logps = [r.old_logps for r in rollouts]
    if config.lora_rank:
        logps += [r.ref_logps for r in rollouts]
    if case == "one row":  # of which two processes have one and none
        rollouts = [r for r in rollouts if r.advantage > 0][:1]
    for step in (1, 2, 3):
        metrics = grpo.update(policy, optimizer, accelerator, rollouts, config, step)
    weights = {name: weight.float().cpu().clone() for name, weight in parallel.whole_weights(model)}
    of_all = parallel.join([weights])
    drift = max((a[name] - b[name]).abs().max().item() for a in of_all for b in of_all for name in a)
    return dict(weights=weights, metrics=metrics, logps=logps, drift=drift)


def results(cases: list[str], precision: str = "fp32") -> dict:
    found = {}
    for case in [*cases, "one row"]:
        settings = CASES.get(case, (GRPO,))[0] | dict(lr=LR, max_completion_tokens=16, grad_clip=0.5)
        settings |= dict(precision=precision)
        config = grpo.Config(model="m", task="t", device="cpu", **settings)
        found[case] = trained(case, devices.make_accelerator(config), config)
    return found


if __name__ == "__main__":
    out, precision, *cases = sys.argv[1:]
    torch.compiler.set_stance("force_eager")  # as the fixture no_compile
    found = results(cases, precision)
    state = PartialState()
    assert state.num_processes == 2
    if state.is_main_process:
        torch.save(found | {"kind": state.distributed_type.value}, out)
