"""Sampling with vLLM in this process. It has weights of its own, which follow those of the trainer."""

import atexit
import hashlib
import os
import random
import shutil
import tempfile
import weakref
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from harness import lora, memory
from harness.messages import LibraryLog, reason_of
from harness.settings import Config, Sample, Sampling, UsageError


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


def longest_row(model_config, config: Config) -> int:
    """The tokens that a row of this run can have: prompt and completion."""
    longest = config.max_prompt_tokens + config.max_completion_tokens + 32  # the evaluation may add a prefix
    return min(longest, getattr(model_config, "max_position_embeddings", longest))


def engine_settings(model_config, config: Config, dtype: torch.dtype, processes: int) -> dict:
    """What an engine needs to sample for this run, be it in this process or in a server: arguments of `vllm.LLM`."""
    rows = max(config.sample_rows, memory.own_rows(config, processes))
    return dict(
        dtype=str(dtype).removeprefix("torch."),
        hf_overrides={"head_dtype": "float32"},  # logits in float32, as the trainer's are
        load_format="dummy",  # the first `sync` brings the weights
        max_model_len=longest_row(model_config, config),
        max_num_seqs=rows,
        compilation_config={"cudagraph_capture_sizes": graph_sizes(rows)},
        logprobs_mode="processed_logprobs",  # of the distribution that is sampled from, temperature included
        generation_config="vllm",  # and not sampling settings that a model brings along
        trust_remote_code=config.trust_remote_code,
        enforce_eager=not torch.cuda.is_available(),
        seed=config.seed,
    )


def request_settings(eos_ids: list[int], group_size: int, sampling: Sampling, seed: int, i: int) -> dict:
    """How vLLM is to sample for prompt `i`: arguments of `vllm.SamplingParams`.

    Each request has a seed of its own, so that a resumed run samples the same, wherever it does.
    """
    return dict(
        n=group_size, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
        max_tokens=sampling.max_tokens, logprobs=0, detokenize=bool(sampling.stop), stop=list(sampling.stop),
        include_stop_str_in_output=True, stop_token_ids=eos_ids,
        seed=random.Random(f"{seed}/{i}").getrandbits(48),
    )  # fmt: skip


class VLLMSampler:
    """Samples with vLLM, in this process. It has weights of its own, which `sync` replaces after each update."""

    def __init__(self, folder: str, model: nn.Module, eos_ids: list[int], config: Config, dtype: torch.dtype):
        # In this process: weights are then handed over by reference. Before the import, which reads it.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
        self.log = LibraryLog("vllm")
        self.model, self.eos = model, eos_ids
        self.on_cpu, self.sleeps, self.asleep = not torch.cuda.is_available(), config.vllm_sleep, False
        free, processes = memory.free_memory(next(model.parameters()).device), PartialState().num_processes
        shape, half = memory.Shape.of(model.config), dtype.itemsize == 2
        settings = engine_settings(model.config, config, dtype, processes) | dict(
            kv_cache_memory_bytes=memory.vllm_cache_bytes(shape, config, half, free, processes),
            gpu_memory_utilization=0.05,  # only checked against: the line above says what is taken
            skip_tokenizer_init=not config.stop,  # token ids in, token ids out; strings have to be looked for
            tokenizer=folder,
            distributed_executor_backend="external_launcher" if processes > 1 else None,  # each on the GPU of its rank
            enable_sleep_mode=config.vllm_sleep,
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
            raise UsageError(
                f"vLLM cannot run {folder}: {reason_of(error)} (--sampler torch runs anywhere, slower; vLLM's messages "
                f"are in {self.log.path})"
            ) from error
        atexit.register(shut_down, weakref.ref(self.llm))
        self.sync()

    def generate(self, prompts: list[list[int]], group_size: int, sampling: Sampling, seed: int) -> list[Sample]:
        """As `TorchSampler.generate`."""
        params = [
            self.params(**request_settings(self.eos, group_size, sampling, seed, i), flat_logprobs=True)
            for i in range(len(prompts))
        ]
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
        weights = lora.merged_weights(self.model)
        self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))
        if self.on_cpu and self.model.config.tie_word_embeddings:
            # vLLM's CPU build keeps the head in a packed copy, which the reload leaves as it was
            self.llm.apply_model(lambda m: m.lm_head.quant_method.process_weights_after_loading(m.lm_head))
        if self.asleep:
            self.llm.wake_up(["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: it would answer with keys of the old weights")
