"""The small-model track: a tiny ALiBi transformer on synthetic arithmetic.

Importing this package registers the model with the transformers Auto classes, so that
`AutoModelForCausalLM.from_pretrained("mathformer/pretrained")` works.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mathformer.model import MathformerConfig, MathformerForCausalLM, MathformerModel
from mathformer.task import ArithmeticTask

AutoConfig.register("mathformer", MathformerConfig)
AutoModel.register(MathformerConfig, MathformerModel)
AutoModelForCausalLM.register(MathformerConfig, MathformerForCausalLM)

__all__ = ["ArithmeticTask", "MathformerConfig", "MathformerForCausalLM", "MathformerModel"]
