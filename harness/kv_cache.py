"""A key-value cache for sampling that is not copied: not for a new token, not for a row that ends, not by attention."""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "sdpa_shared_keys"
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def share_keys(model):
    """The model, which computes with `attention` from now on if it is one that would with `sdpa` of the library."""
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(ATTENTION)
    return model


def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The library's attention, but for a new token in a model whose heads share keys (arXiv 2305.13245).

    The library then repeats the keys and values for each head that shares them, which for padded prompts is a copy of
    several times the cache for each new token. Here the heads that share keys are queries of one head.

    Args:
        query: [B, heads, T, D]. key, value: [B, heads of the keys, keys, D].
        attention_mask: None or [B, 1 or heads, T, keys], False or -inf on what is not seen.

    Returns:
        [B, T, heads, D], and None in the place of the attention's weights.
    """
    (B, heads, T, D), key_heads = query.shape, key.shape[1]
    if T > 1 or heads == key_heads or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if attention_mask is not None:
        attention_mask = attention_mask.expand(B, heads, 1, -1).view(B, key_heads, heads // key_heads, -1)
    query = query.reshape(B, key_heads, heads // key_heads, D)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(B, 1, heads, D), None


AttentionInterface.register(ATTENTION, attention)


def take_rows(cache, rows: torch.Tensor) -> None:
    """Row i of the cache becomes what row `rows[i]` was, and keys and values grow in place from now on.

    Layers with other kinds of memory, such as windows or the states of recurrent layers, keep their own ways.
    """
    for i, layer in enumerate(cache.layers):
        if type(layer) is GrowingLayer:
            layer.batch_select_indices(rows)
        else:
            layer.reorder_cache(rows)
        if type(layer) is DynamicLayer:
            cache.layers[i] = GrowingLayer(layer)


def close_gaps(stopped: torch.Tensor) -> torch.Tensor:
    """Which rows [left] stand where, once those of `stopped` [rows] have left: `abcde` without b and d is `aec`.

    Rows from the end take the places of those that left; all others stay, so that little of a cache is copied.
    """
    left = len(stopped) - int(stopped.sum())
    rows = torch.arange(left, device=stopped.device)
    rows[stopped[:left]] = left + (~stopped[left:]).nonzero()[:, 0]
    return rows


class GrowingLayer(DynamicLayer):
    """A layer of the key-value cache, with spare room behind its tokens: a new token is written there.

    The layer that it replaces makes a new tensor of all keys and values for each new token and for each row that ends,
    which is most of the time that a small model needs for sampling.
    """

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values  # views of the used part, [B, heads, tokens, D]
        self.room = {"keys": layer.keys, "values": layer.values}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        for name, states in (("keys", key_states), ("values", value_states)):
            held = getattr(self, name)
            used, end = held.shape[2], held.shape[2] + states.shape[2]
            if end > self.room[name].shape[2]:  # a quarter more each time: copied now and then, and little is unused
                self.room[name] = held.new_empty(*held.shape[:2], end + max(4, end // 4), held.shape[3])
                self.room[name][:, :, :used] = held
            self.room[name][:, :, used:end] = states
            setattr(self, name, self.room[name][:, :, :end])
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Row i becomes what row `indices[i]` was; only rows that change are copied."""
        changed = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        for name in ("keys", "values"):
            held = getattr(self, name)
            held[changed] = held[indices[changed]]
            setattr(self, name, held[: len(indices)])
            self.room[name] = self.room[name][: len(indices)]
