"""The small-model track: a tiny ALiBi transformer on synthetic arithmetic.

Importing this package registers the model with the transformers Auto classes, so that
`AutoModelForCausalLM.from_pretrained("mathformer/pretrained")` works.
"""

import os

os.environ.setdefault("MKL_CBWR", "AUTO")  # before torch is imported, as in grpo.py: a run repeats to the last digit

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mathformer.model import MathformerConfig, MathformerForCausalLM, MathformerModel
from mathformer.task import ArithmeticTask

AutoConfig.register("mathformer", MathformerConfig)
AutoModel.register(MathformerConfig, MathformerModel)
AutoModelForCausalLM.register(MathformerConfig, MathformerForCausalLM)


def register_with_vllm() -> None:
    """Lets vLLM load checkpoints without experts: it runs them as a BLOOM, whose weights and arithmetic are the same.

    In the process that makes the `vllm.LLM`, before that.
    """
    from vllm import ModelRegistry

    ModelRegistry.register_model("MathformerForCausalLM", "vllm.model_executor.models.bloom:BloomForCausalLM")


__all__ = ["ArithmeticTask", "MathformerConfig", "MathformerForCausalLM", "MathformerModel", "register_with_vllm"]
