"""Weights as the compressed-tensors library of the vLLM project writes them (llm-compressor does with it).

`fastserve_kernels.formats.compressed_tensors` reads the tensors of one weight; this file picks the scheme of
each module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastserve.checkpoints.compressed_checkpoint import ModuleTensors
from fastserve.checkpoints.model_error import ModelError
from fastserve_kernels.formats import Weight
from fastserve_kernels.formats.compressed_tensors import LAYOUTS, CompressedTensors, from_compressed_tensors

_REASONS = {"marlin-24": " (it is the order in which one kernel reads, and has no way back)"}


@dataclass(frozen=True)
class _Group:
    """An entry of `config_groups`: which modules it targets, and how their weights are stored."""

    targets: tuple[str, ...]
    scheme: Mapping[str, Any]
    format: str


class CompressedTensorsLayout:
    """The `Layout` of compressed-tensors, a scheme for each group of modules."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config` is `quantization_config`. Raises ModelError for what we cannot read in it."""
        _check_allowed("quantization_status", config.get("quantization_status"), "compressed", None)
        _check_allowed("transform_config", config.get("transform_config"), {}, None)
        self._ignore: tuple[str, ...] = tuple(config.get("ignore") or ())
        self._groups = [
            _group(f"config_groups.{name}", entry, config.get("format"))
            for name, entry in (config.get("config_groups") or {}).items()
        ]
        sparsity = config.get("sparsity_config") or {}
        self._sparse_format: str = sparsity.get("format", "dense")
        _check_format("sparsity_config.format", self._sparse_format, ("dense", *LAYOUTS))

    def applies_to(self, module: ModuleTensors) -> bool:
        """Whether a group of the config targets it, or its weight is stored by a bitmask."""
        return self._group_of(module.name) is not None or "bitmask" in module.shapes

    def weight_shape(self, module: ModuleTensors) -> tuple[int, int]:
        """[N, K], from the tensor that says it, else from `weight`. Raises ValueError if there is neither."""
        name = next((name for name in ("weight_shape", "shape") if name in module.shapes), None)
        if name is None:
            return module.shape("weight")
        rows, columns = module.tensor(name).flatten().tolist()
        return rows, columns

    def load_weight(self, module: ModuleTensors) -> Weight:
        """A weight in the format that its scheme asks for.

        Raises ValueError for wrong tensors, and for schemes that no format of ours holds.
        """
        group = self._group_of(module.name)
        if group is None:
            stored = CompressedTensors(self._sparse_format, module.tensors(), {})
        else:
            stored = CompressedTensors(group.format, module.tensors(), group.scheme)
        return from_compressed_tensors(stored)

    def _group_of(self, name: str) -> _Group | None:
        """The group that names the module in the best way, as the library chooses it."""
        if _class_of(name) is None or _best_match(name, self._ignore) is not None:
            return None
        matches = [(_best_match(name, group.targets), group) for group in self._groups]
        found = [(match, group) for match, group in matches if match is not None]
        return min(found, key=lambda pair: pair[0])[1] if found else None


def _group(field: str, entry: Any, model_format: str | None) -> _Group:
    if not isinstance(entry, Mapping):
        raise ModelError(
            f"quantization_config.{field}: got {entry!r}; allowed: a scheme with targets and weights"
        )
    form = entry.get("format") or model_format
    _check_format(f"{field}.format", form, LAYOUTS)
    return _Group(tuple(entry["targets"]), entry, str(form))


def _check_format(field: str, found: str | None, allowed: tuple[str, ...]) -> None:
    if found not in allowed:
        reason = _REASONS.get(str(found), "")
        raise ModelError(f"quantization_config.{field}: got {found!r}{reason}; allowed: {', '.join(allowed)}")


def _check_allowed(field: str, found: object, *allowed: object) -> None:
    if found not in allowed:
        raise ModelError(f"quantization_config.{field}: got {found!r}; allowed: {allowed[0]!r}")


def _class_of(name: str) -> str | None:
    """The class of a module of the Llama family as torch calls it; None for those without a matrix."""
    last = name.rpartition(".")[2]
    if last == "embed_tokens":
        return "Embedding"
    return "Linear" if last == "lm_head" or last.endswith("_proj") else None


def _best_match(name: str, targets: Iterable[str]) -> tuple[int, str] | None:
    """The target that names a module best, and how: 0 by its name, 1 by a pattern, 2 by its class; None if
    none does."""
    ranks = []
    for target in targets:
        if target == name:
            ranks.append((0, target))
        elif target.startswith("re:") and re.match(target.removeprefix("re:"), name):
            ranks.append((1, target))
        elif target == _class_of(name):
            ranks.append((2, target))
    return min(ranks, default=None)
