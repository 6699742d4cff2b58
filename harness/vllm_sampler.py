"""Sampling with vLLM, which has weights of its own, and the proof that they follow those of the trainer."""

import atexit
import hashlib
import os
import random
import shutil
import tempfile
import weakref
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from torch import nn
from torch.distributed.tensor import DTensor

from harness import memory, parallel
from harness.batching import logps_under
from harness.messages import LibraryLog, stage
from harness.metrics import average
from harness.settings import MAX_LOGP_GAP, Config, Sample, Sampling, UsageError


def graph_sizes(rows: int) -> list[int]:
    """The batch sizes for which CUDA graphs are captured; a batch runs in the next larger one.

    vLLM's own 51 sizes take 5 s on an H100. These are as close as they must be: decoding is bound by memory, so that a
    few rows more cost little. Beyond 512 rows there is no graph, as vLLM has it.
    """
    most = min(rows, 512)
    grid = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, 512, 64)]
    return [size for size in grid if size < most] + [most]


def cache_folder(vllm) -> Path:
    """Where vLLM keeps what it has compiled; one for this process alone where that cannot be written."""
    cache = Path(vllm.envs.VLLM_CACHE_ROOT)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        print(f"{cache} cannot be written ({error.strerror}): vLLM will compile anew at the next start")
        cache = Path(tempfile.mkdtemp())
        os.environ["VLLM_CACHE_ROOT"] = str(cache)
    return cache


def shape_folder(folder: str, model: nn.Module, cache: Path) -> str:
    """A folder with the model's config alone, always the same one for an architecture of these sizes.

    vLLM keeps what it has compiled under a key that has the name of the model's folder in it, so that a run that goes
    on from a checkpoint would compile anew. A model that brings its own code is taken from where it is.
    """
    if hasattr(model.config, "auto_map"):
        return folder
    digest = hashlib.sha256(model.config.to_json_string().encode()).hexdigest()[:16]
    home = cache / "grpo_shapes" / digest
    if not home.exists():
        home.parent.mkdir(exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=home.parent))
        model.config.save_pretrained(made)
        with suppress(OSError):  # another process was faster
            made.rename(home)
        shutil.rmtree(made, ignore_errors=True)
    return str(home)


def shut_down(llm: weakref.ref) -> None:
    """At the end of the program, while all of it is still there: or NCCL complains of a group that was left open."""
    if engine := llm():
        engine.llm_engine.engine_core.shutdown()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class VLLMSampler:
    """Samples with vLLM, in this process. It has weights of its own, which `sync` replaces after each update."""

    def __init__(self, folder: str, model: nn.Module, eos_ids: list[int], config: Config, bf16: bool):
        # In this process: weights are then handed over by reference. Before the import, which reads it.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
        self.log = LibraryLog("vllm")
        self.model, self.eos = model, eos_ids
        self.on_cpu, self.sleeps, self.asleep = not torch.cuda.is_available(), config.vllm_sleep, False
        longest = config.max_prompt_tokens + config.max_completion_tokens + 32  # the evaluation may add a prefix
        free, processes = memory.free_memory(next(model.parameters()).device), PartialState().num_processes
        rows = max(config.sample_rows, memory.own_rows(config, processes))
        settings = dict(
            dtype="bfloat16" if bf16 else "float32",
            hf_overrides={"head_dtype": "float32"},  # logits in float32, as the trainer's are
            load_format="dummy",  # the first `sync` brings the weights
            max_model_len=min(longest, getattr(model.config, "max_position_embeddings", longest)),
            max_num_seqs=rows,
            compilation_config={"cudagraph_capture_sizes": graph_sizes(rows)},
            kv_cache_memory_bytes=memory.vllm_cache_bytes(memory.Shape.of(model.config), config, bf16, free, processes),
            gpu_memory_utilization=0.05,  # only checked against: the line above says what is taken
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from, temperature included
            generation_config="vllm",  # and not sampling settings that a model brings along
            skip_tokenizer_init=not config.stop,  # token ids in, token ids out; strings have to be looked for
            tokenizer=folder,
            trust_remote_code=config.trust_remote_code,
            enforce_eager=self.on_cpu,
            distributed_executor_backend="external_launcher" if processes > 1 else None,  # each on the GPU of its rank
            enable_sleep_mode=config.vllm_sleep,
            seed=config.seed,
        )
        try:
            with self.log.everything():
                vllm = import_module("vllm")
                if model.config.model_type == "mathformer":
                    import_module("mathformer").register_with_vllm()
            shape = shape_folder(folder, model, cache_folder(vllm))
            with self.log.everything():
                self.llm, self.params = vllm.LLM(shape, **settings), vllm.SamplingParams
            self.log.take("vllm")  # not before: it sets up its logging once more
        except Exception as error:  # of many kinds: memory, architecture, a GPU that is not there
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"vLLM cannot run {folder}: {reason} (--sampler torch runs anywhere, slower; vLLM's messages are in "
                f"{self.log.path})"
            ) from error
        atexit.register(shut_down, weakref.ref(self.llm))
        self.sync()

    def generate(self, prompts: list[list[int]], group_size: int, sampling: Sampling, seed: int) -> list[Sample]:
        """As `TorchSampler.generate`. Each request has a seed of its own, so that a resumed run samples the same."""
        params = [
            self.params(
                n=group_size, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
                max_tokens=sampling.max_tokens, logprobs=0, flat_logprobs=True, detokenize=bool(sampling.stop),
                stop=list(sampling.stop), include_stop_str_in_output=True, stop_token_ids=self.eos,
                seed=random.Random(f"{seed}/{i}").getrandbits(48),
            )
            for i in range(len(prompts))
        ]  # fmt: skip
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        return [
            Sample(ids, list(c.token_ids), list(c.logprobs.logprobs), c.finish_reason == "length")
            for ids, output in zip(prompts, self.llm.generate(requests, params, use_tqdm=False), strict=True)
            for c in output.outputs
        ]

    def sleep(self) -> None:
        """Gives back the memory of weights and cache, if the settings say so, until the next `sync`."""
        if self.sleeps:
            self.llm.sleep(level=2)  # 2: the weights are dropped, not kept on the CPU, since new ones will come
            self.asleep = True

    def sync(self) -> None:
        """Gives vLLM the trainer's weights, and makes it forget what it has cached of prompts under the old ones."""
        if self.asleep:
            torch.cuda.empty_cache()  # what the update has used goes back to the card, which vLLM now takes from
            self.llm.wake_up(["weights"])
        weights = parallel.whole_weights(self.model)
        self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))
        if self.on_cpu and self.model.config.tie_word_embeddings:
            # vLLM's CPU build keeps the head in a packed copy, which the reload leaves as it was
            self.llm.apply_model(lambda m: m.lm_head.quant_method.process_weights_after_loading(m.lm_head))
        if self.asleep:
            self.llm.wake_up(["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: it would answer with keys of the old weights")


def logp_gap(policy: nn.Module, accelerator: Accelerator, config: Config, samples: list[Sample]) -> float:
    """Mean absolute difference of the sampler's log-probs and the policy's, over all tokens of all processes."""
    samples = parallel.join(samples)
    logps = logps_under(policy, samples, accelerator, config.tokens_per_microbatch)
    return average(abs(a - b) for s, row in zip(samples, logps, strict=True) for a, b in zip(s.logps, row, strict=True))


def proven_sampler(run, config: Config) -> VLLMSampler:
    """A sampler for the parts of a `loading.Run`, with the trainer's weights, which are seen to reach it."""
    bf16 = run.accelerator.mixed_precision == "bf16"
    with stage("starting vLLM", is_slow=True):
        sampler = VLLMSampler(run.source, run.model, run.eos_ids, config, bf16)
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
    prompts = [(ids * config.max_prompt_tokens)[: config.max_prompt_tokens] for ids in prompts[:4]]
    sampling = Sampling(min(16, config.max_completion_tokens), config.temperature)

    def require_equal(when: str):
        samples = sampler.generate(prompts, 2, sampling, config.seed)
        if (found := gap(samples)) > MAX_LOGP_GAP:
            raise UsageError(
                f"{when}, vLLM's log-probs differ from the trainer's by {found:.3f} on average: it does not sample "
                "from the policy that is trained. Use --sampler torch, and check that the versions in "
                "requirements-gpu.txt are installed"
            )
        return samples

    before = require_equal("at the start")
    own = [p.to_local() if isinstance(p, DTensor) else p for p in policy.parameters()]  # the parts of this process
    # there is room for a copy on the card, unless it is so small that vLLM has to sleep while it trains
    size, device = sum(p.nbytes for p in own), own[0].device
    true = [p.detach().to(device if memory.free_memory(device) > 2 * size else "cpu", copy=True) for p in own]
    generator = torch.Generator(device).manual_seed(config.seed)
    scale = 0.05
    while gap(before) < 0.5 and scale < 10:
        for p, value in zip(own, true, strict=True):
            noise = torch.empty_like(p).normal_(generator=generator)
            p.copy_(value).add_(noise.mul_(scale * p.abs().mean()))
        scale *= 2
    sampler.sync()
    require_equal("after the weights were changed")
    for p, value in zip(own, true, strict=True):
        p.copy_(value)
    sampler.sync()
    require_equal("after the weights were set back")
