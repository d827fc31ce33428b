"""What a checkpoint says of its KV cache: `kv_cache_scheme`, as compressed-tensors names it.

The config's `quantization_config` holds the scheme, and each layer's attention has two tensors beside its
weights, `self_attn.k_scale` and `self_attn.v_scale`: keys (rotated) and values are stored divided by them.
That is what llm-compressor writes and vLLM reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.safetensors_checkpoint import SafetensorsCheckpoint
from fastserve.checkpoints.transformers_config import read_transformers_config

KVCacheShapes = list[tuple[tuple[int, ...], tuple[int, ...]]]
"""The shapes [blocks, block_size, kv_heads, head_dim] of each layer's keys and values."""


@dataclass(frozen=True, eq=False)
class KVScales:
    """The scales of a layer, [kv_heads] float32 each: keys and values are stored divided by them."""

    k: Tensor
    v: Tensor


SCHEME = "kv_cache_scheme"
_SCALE = re.compile(r"\.layers\.(\d+)\.self_attn\.([kv])_scale$")
_TYPES = {"int": "int8", "float": "fp8"}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "num_bits": (8,),
    "type": tuple(_TYPES),
    "symmetric": (True,),
    "strategy": ("tensor", "attn_head"),
    "dynamic": (False,),
}


@dataclass(frozen=True)
class KVCacheScheme:
    """The dtype and the scales of the KV cache that a checkpoint asks for."""

    dtype: str
    """int8 or fp8, the names of `--kv-cache-dtype`."""
    scales: list[KVScales] | None
    """One per layer; None: the checkpoint names a scheme and has no scales."""


def read_kv_cache_scheme(model: Path, shapes: KVCacheShapes) -> KVCacheScheme | None:
    """The scheme of a checkpoint whose model has caches of these shapes; None if it has no scheme.

    Raises ModelError for a scheme that cannot be followed.
    """
    if model.is_file():
        return None
    quantization: Mapping[str, Any] = (
        getattr(read_transformers_config(model), "quantization_config", None) or {}
    )
    scheme = quantization.get(SCHEME)
    if scheme is None:
        return None
    dtype = _check(model, scheme)
    return KVCacheScheme(dtype, _read_scales(model, shapes))


def kv_cache_scheme(dtype: str, per: str) -> dict[str, Any]:
    """The JSON of a scheme: a cache of `dtype` (int8 or fp8) with scales per "head" or per "layer"."""
    kinds = {name: kind for kind, name in _TYPES.items()}
    strategies = {"head": "attn_head", "layer": "tensor"}
    first = {field: values[0] for field, values in _ALLOWED.items()}
    return first | {"type": kinds[dtype], "strategy": strategies[per]}


def _check(model: Path, scheme: object) -> str:
    """The dtype of a scheme. Raises ModelError."""
    if not isinstance(scheme, Mapping):
        raise ModelError(f"{model}: {SCHEME}: got {scheme!r}; allowed: as compressed-tensors has it")
    for field, allowed in _ALLOWED.items():
        # Those that a scheme may leave out have compressed-tensors' defaults, which are the first allowed.
        value = scheme.get(field, allowed[0])
        if value not in allowed and value is not None:
            raise ModelError(
                f"{model}: {SCHEME}.{field}: got {value!r}; allowed: {', '.join(map(str, allowed))}"
            )
    return _TYPES[scheme.get("type", "int")]


def _read_scales(model: Path, shapes: KVCacheShapes) -> list[KVScales] | None:
    checkpoint = SafetensorsCheckpoint(model)
    names = {(int(m[1]), m[2]): name for name in checkpoint.shapes if (m := _SCALE.search(name))}
    if not names:
        return None
    expected = {(layer, kind) for layer in range(len(shapes)) for kind in "kv"}
    if names.keys() != expected:
        differing = ", ".join(
            f"layers.{layer}.{kind}_scale" for layer, kind in sorted(names.keys() ^ expected)
        )
        raise ModelError(
            f"{model}: {SCHEME}: each layer needs both of its scales; missing or too many: {differing}"
        )

    def read(layer: int, kind: str) -> Tensor:
        return _read_scale(checkpoint, names[layer, kind], heads=shapes[layer][0][2])

    return [KVScales(read(layer, "k"), read(layer, "v")) for layer in range(len(shapes))]


def _read_scale(checkpoint: SafetensorsCheckpoint, name: str, heads: int) -> Tensor:
    """[heads] float32. Raises ModelError."""
    scale = torch.empty(checkpoint.shapes[name], dtype=torch.float32)
    checkpoint.read(name, scale)
    if scale.numel() not in (1, heads) or not (scale.isfinite() & (scale > 0)).all():
        raise ModelError(
            f"{name}: got {scale.flatten()[:4].tolist()} of shape {list(scale.shape)}; allowed: a positive "
            f"number, or one for each of {heads} heads"
        )
    return scale.flatten().expand(heads).contiguous()
