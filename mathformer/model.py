"""A small decoder-only transformer with ALiBi positions, written by hand.

The arithmetic and the parameter names are those of BLOOM (arXiv 2211.05100): token embedding, LayerNorm,
pre-norm blocks of attention and a 4x MLP with tanh GELU, biases everywhere, a tied output head. A checkpoint
of ours therefore loads into transformers' `BloomForCausalLM` unchanged, which is how the tests check it.

ALiBi (arXiv 2108.12409) has no position embeddings. Head h adds `-slope_h * (i - j)` to the score of query i
and key j, so that a head with a steep slope looks at its neighbours and one with a flat slope looks far.

With `num_experts` above 1, each block has that many MLPs and a router that sends every token through `active_experts`
of them (mixture of experts, arXiv 1701.06538). That is no longer a BLOOM.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

# (hidden size, layers, heads)
SIZES = {
    "tiny": (48, 3, 4),
    "small": (64, 4, 4),
    "medium": (128, 6, 4),
    "large": (256, 8, 8),
}


class MathformerConfig(PreTrainedConfig):
    """Shape of the model. `hidden_size` is the width, a multiple of `num_attention_heads`."""

    model_type = "mathformer"
    # vLLM runs this model as a BLOOM, and asks for these two by BLOOM's names
    attribute_map = {"n_head": "num_attention_heads"}
    apply_residual_connection_post_layernorm = False

    vocab_size: int = 64
    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_experts: int = 1  # MLPs of a block; 1 is a plain MLP without a router
    active_experts: int = 1  # how many of them a token goes through
    hidden_dropout: float = 0.0  # on what each block adds, in training only
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
        if not 1 <= self.active_experts <= self.num_experts:
            raise ValueError(
                f"active_experts is {self.active_experts}, it must be from 1 to num_experts, {self.num_experts}"
            )
        if not 0 <= self.hidden_dropout < 1:
            raise ValueError(f"hidden_dropout is {self.hidden_dropout}, it must be from 0 to less than 1")
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


class MixtureOfExperts(nn.Module):
    """`num_experts` MLPs, of which each token goes through the `active_experts` that the router finds most likely.

    Their outputs are added with the router's probabilities as weights. (Not normalised to 1: with one active expert the
    weight would then always be 1, and the router would get no gradient from the loss.)
    """

    def __init__(self, config: MathformerConfig):
        super().__init__()
        self.active_experts = config.active_experts
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList([MLP(config) for _ in range(config.num_experts)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, D] to [B, T, D], and the router's logits [B*T, num_experts].

        No expert has a capacity and no token is dropped, so an output does not depend on the rest of the batch.
        """
        tokens = x.flatten(0, 1)  # [N, D]
        router_logits = self.router(tokens)
        weights, chosen = router_logits.softmax(-1).topk(self.active_experts)  # both [N, active]
        chosen = chosen.flatten()
        order = chosen.argsort()  # sorted by expert: each of them works on one slice, all its tokens at once
        counts = chosen.bincount(minlength=len(self.experts)).tolist()
        slices = tokens.index_select(0, order // self.active_experts).split(counts)
        outputs = torch.cat([expert(inputs) for expert, inputs in zip(self.experts, slices, strict=True)])
        outputs = torch.empty_like(outputs).index_copy(0, order, outputs).unflatten(0, weights.shape)  # [N, active, D]
        return (outputs * weights[..., None]).sum(1).view_as(x), router_logits


def load_balancing_loss(router_logits: tuple[torch.Tensor, ...], real: torch.Tensor, active_experts: int):
    """1 where each expert of each layer gets as many tokens as any other, more where some get more.

        mean over layers of  num_experts * sum over experts e of  f_e * p_e

    with f_e the share of choices that fell on e and p_e the mean router probability of e, as in Switch Transformer
    (arXiv 2101.03961, eq. 4) for any number of active experts.

    Args:
        router_logits: of each layer, [N, num_experts].
        real: [N], True on the tokens that count; padding does not.
    """
    total = 0.0
    for logits in router_logits:
        probs = logits[real].softmax(-1)
        chosen = probs.topk(active_experts).indices.flatten()
        share = chosen.bincount(minlength=probs.shape[-1]) / len(chosen)
        total = total + probs.shape[-1] * (share * probs.mean(0)).sum()
    return total / len(router_logits)


class Block(nn.Module):
    def __init__(self, config: MathformerConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.self_attention = Attention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config) if config.num_experts == 1 else MixtureOfExperts(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: torch.Tensor, bias: torch.Tensor, cache: Cache | None):
        """The block's output [B, T, D], and its router's logits if it has one."""
        x = x + self.dropout(self.self_attention(self.input_layernorm(x), bias, cache))
        out = self.mlp(self.post_attention_layernorm(x))
        out, router_logits = out if isinstance(self.mlp, MixtureOfExperts) else (out, None)
        return x + self.dropout(out), router_logits


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
        output_router_logits: bool = False,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        x = self.word_embeddings_layernorm(x)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        bias = self.attention_bias(past, x.shape[1], attention_mask, x)
        routed = []
        for block in self.h:
            x, router_logits = block(x, bias, past_key_values)
            routed.append(router_logits)
        return MoeModelOutputWithPast(
            last_hidden_state=self.ln_f(x),
            past_key_values=past_key_values,
            router_logits=tuple(routed) if output_router_logits and self.config.num_experts > 1 else None,
        )


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
    ) -> MoeCausalLMOutputWithPast:
        """`labels` [B, T] are the input ids with -100 where there is no loss; they are shifted here."""
        out = self.transformer(
            input_ids, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache, **kwargs
        )
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return MoeCausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, router_logits=out.router_logits
        )
