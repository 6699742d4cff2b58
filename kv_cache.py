"""A key-value cache for sampling, in which neither a new token nor a row that ends costs a copy of the whole."""

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


def make_room(cache) -> None:
    """Lets the cache of a model grow in place. Models with other kinds of memory keep their own."""
    if type(cache) is DynamicCache:
        cache.layers = [GrowingLayer(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]


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
