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

from fastserve.checkpoints.kv_cache_scheme import SCHEME, kv_cache_scheme
from fastserve.compression.calibration.layer import Layer
from fastserve.compression.calibration.layer_step import LayerStep
from fastserve.compression.errors import RecipeError
from fastserve.compression.state.model_state import State, StateWriter
from fastserve.compression.step import Context, WeightKind
from fastserve.models.kv_cache import KV_CACHE_DTYPES, QUANTIZED_MAX
from fastserve.models.kv_cache_quantization import candidate_scales, least_error, squared_errors

ERRORS_OF_EVERY = 16
"""One token of so many is rounded with each scale that is tried: 4096 of the usual 128 windows."""


class KVCacheScales(LayerStep, frozen=True, kw_only=True, tag="kv_cache"):
    """Measures the scales of each layer's keys and values. Linears stay as they are."""

    dtype: Literal["int8", "fp8"] = "fp8"
    scales: Literal["max", "mse"] = "mse"
    """max: the largest magnitude becomes the largest number of 8 bits; mse: of the scales around that one,
    the one with the least squared error."""
    per: Literal["head", "layer"] = "head"
    """The unit that shares a scale. `layer` is less exact, and is what older versions of vLLM read."""

    targets: tuple[str, ...] = ()
    """No linear changes."""

    accepts: ClassVar[frozenset[WeightKind]] = frozenset(("dense", "sparse", "low rank", "quantized"))

    def check(self, config: PretrainedConfig) -> None:
        """Raises RecipeError for `targets`: the scales are those of all layers."""
        if self.targets:
            raise RecipeError(f"targets: got {', '.join(self.targets)}; allowed: none, it is for all layers")

    def run(self, before: State, after: StateWriter, context: Context) -> None:
        """Measures layer by layer, and writes the scheme into the config."""
        super().run(before, after, context)
        config = copy.deepcopy(before.config)
        quantization = getattr(config, "quantization_config", None) or {}
        config.quantization_config = {**quantization, SCHEME: kv_cache_scheme(self.dtype, self.per)}
        after.write_config(config)

    def compress(self, layer: Layer, names: tuple[str, ...]) -> None:
        """Adds the scales of its keys and values to the layer."""
        for kind, scale in self._measure(layer).items():
            # compressed-tensors has these shapes. Where all is zero any scale will do but zero.
            shaped = scale.reshape((-1, 1, 1) if self.per == "head" else (1,))
            layer.add_other(f"self_attn.{kind}_scale", torch.where(shaped > 0, shaped, 1.0).cpu())

    def _measure(self, layer: Layer) -> dict[str, Tensor]:
        """The scales [heads], or [1], of keys ("k") and of values ("v")."""
        dtype = KV_CACHE_DTYPES[self.dtype]
        largest = self._reduce(layer, lambda _, x: x.abs().amax((0, 2)), torch.maximum)
        if self.scales == "max":
            return {kind: most / QUANTIZED_MAX[dtype] for kind, most in largest.items()}
        candidates = {kind: candidate_scales(most, dtype) for kind, most in largest.items()}
        errors = self._reduce(
            layer, lambda kind, x: squared_errors(x[::ERRORS_OF_EVERY], candidates[kind], dtype), torch.add
        )
        return {kind: least_error(candidates[kind], errors[kind]) for kind in candidates}

    def _reduce(
        self,
        layer: Layer,
        measure: Callable[[str, Tensor], Tensor],
        combine: Callable[[Tensor, Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """The results of `measure` on keys and on values [tokens, heads, dim] of each batch, combined.

        A layer that shares a scale counts as one head.
        """
        found: dict[str, Tensor] = {}
        for cached in _cached(layer):
            for kind, states in zip("kv", cached, strict=True):
                x = states.transpose(1, 2).flatten(0, 1)
                measured = measure(kind, x if self.per == "head" else x.flatten(1)[:, None])
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
