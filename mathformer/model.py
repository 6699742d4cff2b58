"""A small decoder-only transformer with ALiBi positions, written by hand.

The arithmetic and the parameter names are those of BLOOM (arXiv 2211.05100): token embedding, LayerNorm,
pre-norm blocks of attention and a 4x MLP with tanh GELU, biases everywhere, a tied output head. A checkpoint
of ours therefore loads into transformers' `BloomForCausalLM` unchanged, which is how the tests check it.

ALiBi (arXiv 2108.12409) has no position embeddings. Head h adds `-slope_h * (i - j)` to the score of query i
and key j, so that a head with a steep slope looks at its neighbours and one with a flat slope looks far.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

# (hidden size, layers, heads)
SIZES = {
    "tiny": (48, 3, 4),
    "small": (64, 4, 4),
    "medium": (128, 6, 8),
    "large": (256, 8, 8),
}


class MathformerConfig(PreTrainedConfig):
    """Shape of the model. `hidden_size` is the width, a multiple of `num_attention_heads`."""

    model_type = "mathformer"

    vocab_size: int = 64
    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        super().__post_init__(**kwargs)


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """The slope of each head, shape [num_heads]: 2^(-8/n), 2^(-16/n), ... for n a power of two.

    For any other number of heads, the slopes of the power of two below, then every second slope of the power of
    two above (ALiBi paper, footnote 8).
    """
    n = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (h + 1) / n) for h in range(n)]
    extra = [2 ** (-8 * (h + 1) / (2 * n)) for h in range(0, 2 * n, 2)]
    return torch.tensor(slopes + extra[: num_heads - n])


class Attention(nn.Module):
    def __init__(self, config: MathformerConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, bias: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        B, T, D = x.shape
        # BLOOM keeps query, key and value of one head together: [B, T, heads, 3, head_dim]
        qkv = self.query_key_value(x).view(B, T, self.num_heads, 3, self.head_dim).permute(3, 0, 2, 1, 4)
        q, k, v = qkv.unbind(0)  # each [B, heads, T, head_dim]
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.dense(x.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, config: MathformerConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: MathformerConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.self_attention = Attention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, bias: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        x = x + self.self_attention(self.input_layernorm(x), bias, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class MathformerPreTrainedModel(PreTrainedModel):
    config_class = MathformerConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class MathformerModel(MathformerPreTrainedModel):
    """Token ids to hidden states, [B, T] -> [B, T, hidden_size]."""

    def __init__(self, config: MathformerConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.word_embeddings_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.h = nn.ModuleList([Block(config, i) for i in range(config.num_hidden_layers)])
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self):
        return self.word_embeddings

    def set_input_embeddings(self, value):
        self.word_embeddings = value

    def attention_bias(self, past: int, queries: int, attention_mask: torch.Tensor | None, like: torch.Tensor):
        """ALiBi plus the causal mask plus the padding mask, [1 or B, heads, queries, past + queries].

        The bias depends on the key's position only: -slope*(i-j) and slope*j differ by a constant in each row,
        and softmax does not see it. For the same reason left padding needs no position ids.
        """
        keys = past + queries
        position = torch.arange(keys, device=like.device)
        slopes = alibi_slopes(self.config.num_attention_heads).to(like.device)
        bias = (slopes[:, None, None] * (position - (keys - 1))).to(like.dtype)[None]  # [1, heads, 1, keys]
        lowest = -1e4  # also finite in 16 bits, so that a row of padding gives no NaN; exp(-1e4) is 0
        if queries > 1:
            future = position[None, :] > position[past:, None]  # [queries, keys]
            bias = bias.masked_fill(future, lowest)
        if attention_mask is not None:
            bias = bias.masked_fill(attention_mask[:, None, None, :] == 0, lowest)
        return bias.expand(-1, -1, queries, -1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        x = self.word_embeddings_layernorm(x)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        bias = self.attention_bias(past, x.shape[1], attention_mask, x)
        for block in self.h:
            x = block(x, bias, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(x), past_key_values=past_key_values)


class MathformerForCausalLM(MathformerPreTrainedModel, GenerationMixin):
    """The language model: `MathformerModel` and an output head tied to the embedding.

    `generate`, `from_pretrained` and `save_pretrained` are those of transformers.
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: MathformerConfig):
        super().__init__(config)
        self.transformer = MathformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """`labels` [B, T] are the input ids with -100 where there is no loss; they are shifted here."""
        out = self.transformer(
            input_ids, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache, **kwargs
        )
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)
