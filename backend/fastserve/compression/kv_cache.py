"""Scales for a KV cache of 8 bits, from what calibration text puts into it.

A cache keeps keys after their rotation, and values, each divided by its layer's scale and rounded to int8 or
fp8 (e4m3). Scales and scheme have the names that llm-compressor writes and vLLM reads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from fastserve.compression.layer import Layer
from fastserve.compression.state import State, StateWriter
from fastserve.compression.step import Context, Kind, LayerStep, RecipeError
from fastserve.models.kv_cache import KV_CACHE_DTYPES, LARGEST
from fastserve.models.kv_cache_scheme import SCHEME, kv_cache_scheme
from fastserve.models.kv_rounding import candidate_scales, least_error, squared_errors


class KVCacheScales(LayerStep, frozen=True, kw_only=True, tag="kv_cache"):
    """Measures the scales of each layer's keys and values. Linears stay as they are."""

    dtype: Literal["int8", "fp8"] = "fp8"
    scales: Literal["max", "mse"] = "mse"
    """max: the largest magnitude becomes the largest number of 8 bits; mse: of the scales around that one,
    the one with the least squared error."""

    takes: ClassVar[frozenset[Kind]] = frozenset(("dense", "sparse", "low rank", "codes"))

    def selects(self, linear: str) -> bool:
        return False

    def check(self, config: PretrainedConfig) -> None:
        if self.targets != ("*",):
            raise RecipeError(f"targets: got {', '.join(self.targets)}; allowed: none, it is for all layers")

    def run(self, before: State, after: StateWriter, context: Context) -> None:
        super().run(before, after, context)
        config = copy.deepcopy(before.config)
        quantization = getattr(config, "quantization_config", None) or {}
        config.quantization_config = {**quantization, SCHEME: kv_cache_scheme(self.dtype)}
        after.write_config(config)

    def compress(self, layer: Layer, names: tuple[str, ...]) -> None:
        dtype = KV_CACHE_DTYPES[self.dtype]
        largest = _reduce(layer, lambda _, x: x.abs().amax((0, 2)), torch.maximum)
        scales = {kind: most / LARGEST[dtype] for kind, most in largest.items()}
        if self.scales == "mse":
            candidates = {kind: candidate_scales(most, dtype) for kind, most in largest.items()}
            errors = _reduce(layer, lambda kind, x: squared_errors(x, candidates[kind], dtype), torch.add)
            scales = {kind: least_error(candidates[kind], errors[kind]) for kind in candidates}
        for kind, scale in scales.items():
            # A layer whose values are all zero can have any scale but zero.
            layer.add_other(f"self_attn.{kind}_scale", torch.where(scale > 0, scale, 1.0).cpu())


def _reduce(
    layer: Layer, measure: Callable[[str, Tensor], Tensor], combine: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """What `measure` makes of the keys ("k") and of the values ("v") [tokens, 1, heads * dim] of each batch of
    calibration text, put together."""
    found: dict[str, Tensor] = {}
    for keys, values in _cached(layer):
        for kind, x in (("k", keys), ("v", values)):
            measured = measure(kind, x.transpose(1, 2).flatten(2).flatten(0, 1)[:, None])
            found[kind] = combine(found[kind], measured) if kind in found else measured
    return found


def _cached(layer: Layer) -> Iterator[tuple[Tensor, Tensor]]:
    """The keys and the values [sequences, heads, T, dim] that a layer would cache, batch by batch."""
    cache = _WatchedCache()

    def give_cache(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        return given, {**named, "past_key_values": cache}

    hook = layer.module.register_forward_pre_hook(give_cache, with_kwargs=True)
    try:
        for batch in layer.batches():
            layer.run(batch)
            if cache.seen is None:
                raise RecipeError(f"model: {layer.prefix}self_attn puts nothing into a cache of transformers")
            yield cache.seen
    finally:
        hook.remove()


class _WatchedCache:
    """Stands for transformers' cache of keys and values: keeps those of one call, and gives them back."""

    seen: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.seen = (keys, values)
        return keys, values
