"""Encoders: how weights are stored as tensors of their modules, and what `config.json` says of them."""

from __future__ import annotations

import json
from typing import Any, Protocol

from torch import Tensor

from fastserve.checkpoints.fastserve_layout import VERSION
from fastserve.checkpoints.kv_cache_scheme import SCHEME
from fastserve.checkpoints.sparse_24_layout import CONFIG_KEY, from_sparse_24
from fastserve_kernels.formats import Bitmap, BlockSparse, Dense, Sparse24, Sparse24Int4, Weight
from fastserve_kernels.formats.compressed_tensors import to_compressed_tensors
from fastserve_kernels.formats.weight_io import weight_tensors

_HEAD = "lm_head"
_EMBEDDING = "embed_tokens"


class Encoder(Protocol):
    """Takes the weights of a model one after the other."""

    def encode(self, name: str, weight: Weight) -> dict[str, Tensor]:
        """The tensors by local name of the module of this name."""

    def config(self, kv_cache: dict[str, Any] | None) -> dict[str, Any]:
        """The entries of `config.json` for all weights; `kv_cache` is its `kv_cache_scheme`."""


def expressible(name: str, weight: Weight) -> bool:
    """Whether compressed-tensors has a layout for the weight of this module that its newest version reads.

    It has them for embeddings too, but transformers 5.23 fails on those.
    """
    if isinstance(weight, Dense | Sparse24):
        return True
    if isinstance(weight, Bitmap | BlockSparse) or name.endswith(_EMBEDDING):
        return False
    try:
        to_compressed_tensors(from_sparse_24(weight) if isinstance(weight, Sparse24Int4) else weight)
    except ValueError:
        return False
    return True


class CompressedTensorsEncoder:
    """An `Encoder` for weights that are `expressible`."""

    def __init__(self) -> None:
        self._dense: list[str] = []
        self._two_of_four: list[str] = []
        self._groups: dict[str, list[str]] = {}
        """Names of modules by their scheme and format, as JSON."""

    def encode(self, name: str, weight: Weight) -> dict[str, Tensor]:
        """The tensors of a module as compressed-tensors has them."""
        if isinstance(weight, Sparse24 | Sparse24Int4):
            self._two_of_four.append(name)
            weight = from_sparse_24(weight)
        if isinstance(weight, Dense):
            self._dense.append(name)
            return {"weight": weight.weight}
        stored = to_compressed_tensors(weight)
        scheme = json.dumps({"format": stored.format, **stored.scheme}, sort_keys=True)
        self._groups.setdefault(scheme, []).append(name)
        return dict(stored.tensors)

    def config(self, kv_cache: dict[str, Any] | None) -> dict[str, Any]:
        """The `quantization_config` of compressed-tensors, and the names of the 2:4 modules."""
        sparse = {CONFIG_KEY: self._two_of_four} if self._two_of_four else {}
        if not self._groups and kv_cache is None:
            return sparse
        groups = [{**json.loads(scheme), "targets": names} for scheme, names in self._groups.items()]
        formats = {group["format"] for group in groups}
        if len(groups) == 1:
            groups[0]["targets"] = ["Linear"]
        quantization = {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
            "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
            "ignore": self._ignored(),
            SCHEME: kv_cache,
        }
        if len(groups) == 1 and not groups[0]["weights"]["symmetric"]:
            # transformers 5.23 with compressed-tensors 0.20 fails on packed zero points unless it dequantizes
            # as it loads, which it knows to do for one group only.
            quantization["dequantize"] = True
        return sparse | {"quantization_config": quantization}

    def _ignored(self) -> list[str]:
        """The linears that are not quantized; the head among them even if it is the embedding."""
        quantized = {name for names in self._groups.values() for name in names}
        dense = [name for name in self._dense if not name.endswith((_EMBEDDING, _HEAD))]
        return dense if _HEAD in quantized else [*dense, _HEAD]


class OwnEncoder:
    """An `Encoder` for all weights."""

    def __init__(self) -> None:
        self._entries: dict[str, Any] = {}

    def encode(self, name: str, weight: Weight) -> dict[str, Tensor]:
        """The tensors of a module by the fields of its format."""
        if isinstance(weight, Dense):
            return {"weight": weight.weight}
        tensors, entry = weight_tensors(weight)
        self._entries[name] = {**entry, "shape": [weight.out_features, weight.in_features]}
        return tensors

    def config(self, kv_cache: dict[str, Any] | None) -> dict[str, Any]:
        """The `quantization_config` of our own layout (docs/formats.md)."""
        quantization = {
            "quant_method": "fastserve",
            "version": VERSION,
            "weights": self._entries,
            SCHEME: kv_cache,
        }
        return {"quantization_config": quantization}
