"""A sampler with weights of its own, and the proof that they follow those of the trainer."""

import math
from functools import partial
from itertools import cycle, islice

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from harness import lora, memory, parallel
from harness.batching import logps_under
from harness.devices import DTYPES
from harness.messages import stage
from harness.metrics import average
from harness.server_sampler import ServerSampler
from harness.settings import MAX_LOGP_GAP, Config, Sample, Sampling, UsageError
from harness.vllm_sampler import VLLMSampler


def logp_gap(policy: nn.Module, accelerator: Accelerator, config: Config, samples: list[Sample]) -> float:
    """Mean absolute difference of the sampler's log-probs and the policy's, over all tokens of all processes."""
    samples = parallel.join(samples)
    logps = logps_under(policy, samples, accelerator, config.tokens_per_microbatch)
    return average(abs(a - b) for s, row in zip(samples, logps, strict=True) for a, b in zip(s.logps, row, strict=True))


def proven_sampler(run, config: Config) -> VLLMSampler | ServerSampler:
    """A sampler for the parts of a `loading.Run`, with the trainer's weights, which are seen to reach it."""
    parts = run.source, run.model, run.eos_ids, config, DTYPES[run.accelerator.mixed_precision]
    if run.sampler_name == "server":
        with stage("looking for the servers", is_slow=bool(config.serve_on)):
            sampler = ServerSampler(*parts)
    else:
        with stage("starting vLLM", is_slow=True):
            sampler = VLLMSampler(*parts)
    with stage("seeing that vLLM gets the weights"):
        check_sampler(sampler, run.policy, run.accelerator, [problem.ids for problem in run.problems], config)
    return sampler


@torch.no_grad()
def check_sampler(
    sampler, policy: nn.Module, accelerator: Accelerator, prompts: list[list[int]], config: Config
) -> None:
    """Proves that new weights reach a sampler with weights of its own, before the run depends on it.

    Every weight is changed until the log-probs visibly are; then the sampler must follow; then the true weights go
    back, and it must follow again. A sync that does nothing, forgets a layer or keeps a prefix cache does not pass.

    Raises:
        UsageError: it does not follow.
    """
    gap = partial(logp_gap, policy, accelerator, config)
    # as long as they may be: a prefix cache works on whole blocks of tokens
    number = max(4, len(getattr(sampler, "servers", ())))  # each server gets one
    prompts = [(ids * config.max_prompt_tokens)[: config.max_prompt_tokens] for ids in islice(cycle(prompts), number)]
    sampling = Sampling(min(16, config.max_completion_tokens), config.temperature)

    def require_equal(when: str):
        samples = sampler.generate(prompts, 2, sampling, config.seed)
        if not (found := gap(samples)) <= MAX_LOGP_GAP:  # also where it is no number
            raise UsageError(
                f"{when}, vLLM's log-probs differ from the trainer's by {found:.3f} on average: it does not sample "
                "from the policy that is trained. Is its version that of requirements-gpu.txt? The torch sampler needs "
                "no weights of its own"
            )
        return samples

    before = require_equal("at the start")
    sizes = lora.noise_sizes(policy)  # of all that is trained
    own = [p.to_local() if isinstance(p, DTensor) else p for p in sizes]  # the parts of this process
    # there is room for a copy on the card, unless it is so small that vLLM has to sleep while it trains
    size, device = sum(p.nbytes for p in own), own[0].device
    true = [p.detach().to(device if memory.free_memory(device) > 2 * size else "cpu", copy=True) for p in own]
    generator = torch.Generator(device).manual_seed(config.seed)

    def change(scale: float) -> None:
        for p, value, size in zip(own, true, sizes.values(), strict=True):
            noise = torch.empty_like(p).normal_(generator=generator)
            p.copy_(value).add_(noise.mul_(scale * size))

    scale, found = 0.025, 0.0
    while found < 0.5 and scale < 10:
        scale *= 2
        change(scale)
        found = gap(before)
    if math.isnan(found):  # in fp16 so much noise may overflow
        change(scale / 2)
    sampler.sync()
    require_equal("after the weights were changed")
    for p, value in zip(own, true, strict=True):
        p.copy_(value)
    sampler.sync()
    require_equal("after the weights were set back")
