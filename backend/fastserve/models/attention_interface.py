"""Paged attention behind transformers' attention interface.

transformers lets a library bring its own attention (`AttentionInterface`) and its own masks
(`AttentionMaskInterface`). Our attention writes each layer's keys and values into the paged cache and attends
over it. Our mask is a `CausalMask`: how far a layer sees, as the model itself states it when it asks for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from fastserve.checkpoints.model_error import ModelError
from fastserve.models.kv_cache import KVCaches
from fastserve_kernels import ops
from fastserve_kernels.attention_metadata import AttentionMetadata
from fastserve_kernels.kv_cache import KVCache

ATTENTION = "fastserve_paged"
"""The name of our attention and of our masks in transformers' registries."""

PROBE_BLOCKS, PROBE_BLOCK_SIZE = 6, 8


@dataclass(frozen=True)
class CausalMask:
    """A mask: each token attends to itself and those before, or to the last `sliding_window` of these."""

    sliding_window: int | None


@dataclass
class ForwardContext:
    """The attention metadata and the caches of a step, which our attention reads while the modules run."""

    meta: AttentionMetadata
    kv_caches: KVCaches

    def cache_of(self, layer: int, key: Tensor, value: Tensor) -> KVCache:
        """The cache of a layer; key and value are [T, kv_heads, head_dim]."""
        return self.kv_caches[layer]

    def accepts(self, mask: CausalMask, sees: Callable[[int, int], bool]) -> bool:
        """Whether `mask` says of each (query position, key position) what `sees` says: checked at load."""
        return True


@dataclass
class ProbeContext(ForwardContext):
    """The context of a first step over one sequence, to find out which caches and masks a model needs."""

    kv_caches: KVCaches = field(default_factory=list)

    def cache_of(self, layer: int, key: Tensor, value: Tensor) -> KVCache:
        """A new cache of PROBE_BLOCKS blocks. Raises ModelError if a layer is passed over, or comes twice."""
        due = len(self.kv_caches)
        if layer > due:
            raise ModelError(f"layer {due} keeps a state other than keys and values")
        if layer < due:
            raise ModelError(f"layer {layer} attends more than once")
        size = (PROBE_BLOCKS, PROBE_BLOCK_SIZE)
        cache = KVCache(key.new_zeros(*size, *key.shape[1:]), value.new_zeros(*size, *value.shape[1:]))
        self.kv_caches.append(cache)
        return cache

    def accepts(self, mask: CausalMask, sees: Callable[[int, int], bool]) -> bool:
        """Whether they agree at the edges of the window, beyond any prompt that could be computed at load."""
        window = mask.sliding_window
        if window is None:
            far, oldest = 10**6, 0
        else:
            far, oldest = 2 * window, window + 1
        beyond = sees(far, far + 1) or (window is not None and sees(far, oldest - 1))
        return sees(far, far) and sees(far, oldest) and not beyond


_current: ContextVar[ForwardContext] = ContextVar("fastserve_paged_step")


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """A context in which models whose attention implementation is ATTENTION compute this step."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: CausalMask | Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [1, H, T, D], key and value [1, Hk, T, D or Dv]; returns
    [1, T, H, Dv]. Raises ModelError for biases, attention sinks and masks that are not causal.

    What else the modules hand over (dropout, window sizes and the like) says again what config and mask say.
    """
    if not isinstance(attention_mask, CausalMask):
        raise ModelError(
            f"{type(module).__name__} wants a bias, or a mask that is not causal, with or without a window"
        )
    if s_aux is not None:
        raise ModelError(f"{type(module).__name__} has attention sinks, which paged attention has not")
    step = _current.get()
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    cache = step.cache_of(cast(int, module.layer_idx), k, v)
    ops.write_kv(k, v, cache, step.meta.slot_mapping)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    window = attention_mask.sliding_window
    out = ops.paged_attention(q, cache, step.meta, scale, window, softcap)
    return out[None], None


def causal_mask(
    *,
    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    local_size: int | None = None,
    **_: object,
) -> CausalMask | None:
    """transformers' mask factory: `local_size` is the window, and `mask_function` the rule for one pair of
    positions (batch, head, query, key). None if the rule is another than that of the window: models ask for
    masks that no layer of theirs uses, so it is the layer that refuses.
    """

    def sees(query: int, key: int) -> bool:
        zero = torch.tensor(0)
        return bool(mask_function(zero, zero, torch.tensor(query), torch.tensor(key)))

    mask = CausalMask(local_size)
    return mask if _current.get().accepts(mask, sees) else None


AttentionInterface.register(ATTENTION, paged_attention)
AttentionMaskInterface.register(ATTENTION, causal_mask)
