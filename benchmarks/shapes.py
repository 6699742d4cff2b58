"""The shapes of the benchmarks on a GPU: models of random weights, their tokenizer, and the work of a step."""

import math
import platform
import random
import time
from pathlib import Path
from statistics import median

import torch

QWEN = dict(vocab_size=151936, num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True)
SIZES = {
    "Qwen2.5-0.5B": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
    "Qwen2.5-1.5B": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12),
    "Qwen3-1.7B": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16)
    | dict(num_key_value_heads=8, head_dim=128),
    "Qwen2.5-3B": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000),
}
# prompts, completions of each, their mean and largest number of tokens; microbatches as in configs/
WORK = {
    "Qwen2.5-0.5B": dict(P=32, G=8, mean=250, longest=512, microbatch=8192, checkpointing=False),
    "Qwen2.5-1.5B": dict(P=16, G=8, mean=500, longest=1024, microbatch=4096, checkpointing=False),
    "Qwen3-1.7B": dict(P=16, G=8, mean=500, longest=1024, microbatch=8192, checkpointing=True),
    "Qwen2.5-3B": dict(P=16, G=8, mean=400, longest=1024, microbatch=8192, checkpointing=True),
    "tiny": dict(P=2, G=2, mean=8, longest=16, microbatch=512, checkpointing=True),
}
MAX_PROMPT = 128


def model_config(shape: str):
    import transformers

    return getattr(transformers, f"Qwen{3 if 'Qwen3' in shape else 2}Config")(**QWEN | SIZES[shape])


def save_tokenizer(folder: str, vocabulary: int, eos: int) -> None:
    """One that writes token i as the number i and reads digits."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>" if i == eos else str(i): i for i in range(vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(folder)


def matmul(size: int) -> dict:
    """The rate of a matrix product on this card, and its name."""
    on_gpu, seconds = torch.cuda.is_available(), []
    where = dict(dtype=torch.bfloat16, device="cuda") if on_gpu else {}
    a, b = (torch.randn(size, size, **where) for _ in range(2))
    for _ in range(30):
        started = time.perf_counter()
        a @ b
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    name = torch.cuda.get_device_name() if on_gpu else platform.processor() or "a CPU"
    return {"device": name, "matmul_tflops": 2 * size**3 / median(seconds[10:]) / 1e12}


def prepare(shape: str, folder: str, matmul_size: int, partial: Path) -> dict:
    """A model of random weights, and its tokenizer."""
    import transformers

    config, work, low, high = model_config(shape), WORK[shape], 1.0, 1e6
    for _ in range(60):  # the mean of a geometric distribution cut off at n is m * (1 - exp(-n / m))
        m = (low + high) / 2
        low, high = (m, high) if m * (1 - math.exp(-work["longest"] / m)) < work["mean"] else (low, m)
    ends = random.Random(0).sample(range(10, config.vocab_size), round(config.vocab_size / m))
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    save_tokenizer(folder, config.vocab_size, ends[0])
    return matmul(matmul_size) | {"parameters": model.num_parameters(), "end_tokens": len(ends)}
