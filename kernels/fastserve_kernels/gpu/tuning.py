"""The tuned configs: the files tuned/<gpu>.json, and the config of a shape.

A file holds what `fastserve-kernels tune` measured on one kind of GPU:

    {"schema": 1, "device": "NVIDIA H200", "operators": {"linear_int4": [
      {"shape": {"m": 1, "n": 4096, "k": 4096, "group_size": 128}, "constants": {"BLOCK_N": 64},
       "num_warps": 4, "num_stages": 3, "microseconds": 7.12, "date": "2026-11-20"}]}}
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastserve_kernels.gpu.launch import Config
from fastserve_kernels.gpu.operator import Operator, Shape

SCHEMA = 1
DIRECTORY = Path(__file__).parent.parent / "tuned"
STEP_SIZES = frozenset({"m", "batch", "tokens", "context"})
"""Sizes that change from step to step: that they fall between two tuned ones is no reason for a warning."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """The best config for a shape, and what was measured of it."""

    shape: Shape
    config: Config
    microseconds: float
    date: str
    """The day of the measurement, YYYY-MM-DD."""


@dataclass
class TunedConfigs:
    """The contents of a file: by operator, an entry for each tuned shape."""

    device: str
    """The device's name, as torch.cuda.get_device_name says it."""
    entries: dict[str, list[Entry]]

    def has(self, operator: str, shape: Shape) -> bool:
        """Whether there is an entry for just this shape."""
        return any(entry.shape == shape for entry in self.entries.get(operator, []))

    def put(self, operator: str, entry: Entry) -> None:
        """Adds an entry in place of an earlier one for the same shape."""
        others = [old for old in self.entries.get(operator, []) if old.shape != entry.shape]
        self.entries[operator] = [*others, entry]


def file_name(device_name: str) -> str:
    """The file of a GPU: "NVIDIA H200" has nvidia-h200.json."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def load(path: Path) -> TunedConfigs:
    """Reads a file. Raises ValueError, with the path and the place, where it is not as described above."""
    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    try:
        return _parse(document)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save(tuned: TunedConfigs, path: Path) -> None:
    """Writes the file whole or not at all: a reader, or one who is killed, never leaves half of it."""
    operators = {
        name: [_entry_document(entry) for entry in sorted(entries, key=lambda e: tuple(e.shape.items()))]
        for name, entries in sorted(tuned.entries.items())
    }
    lines = [f'  "schema": {SCHEMA}', f'  "device": {json.dumps(tuned.device)}']
    blocks = [
        f"    {json.dumps(name)}: [\n"
        + ",\n".join(f"      {json.dumps(entry)}" for entry in entries)
        + "\n    ]"
        for name, entries in operators.items()
    ]
    lines.append('  "operators": {\n' + ",\n".join(blocks) + "\n  }")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    partial.replace(path)


def _entry_document(entry: Entry) -> dict[str, Any]:
    return {
        "shape": dict(entry.shape),
        "constants": dict(entry.config.constants),
        "num_warps": entry.config.num_warps,
        "num_stages": entry.config.num_stages,
        "microseconds": round(entry.microseconds, 3),
        "date": entry.date,
    }


def _parse(document: object) -> TunedConfigs:
    fields = _object(document, "the file", {"schema", "device", "operators"})
    if fields["schema"] != SCHEMA:
        raise ValueError(f"schema: got {fields['schema']!r}, this version reads {SCHEMA}")
    if not isinstance(fields["device"], str):
        raise ValueError(f"device: got {fields['device']!r}, must be a name")
    entries: dict[str, list[Entry]] = {}
    for name, listed in _object(fields["operators"], "operators").items():
        if not isinstance(listed, list):
            raise ValueError(f"operators.{name}: got {listed!r}, must be a list")
        entries[name] = [_parse_entry(entry, f"operators.{name}[{i}]") for i, entry in enumerate(listed)]
    return TunedConfigs(fields["device"], entries)


def _parse_entry(document: object, place: str) -> Entry:
    names = {"shape", "constants", "num_warps", "num_stages", "microseconds", "date"}
    fields = _object(document, place, names)
    time = fields["microseconds"]
    if isinstance(time, bool) or not isinstance(time, int | float) or not time > 0:
        raise ValueError(f"{place}.microseconds: got {time!r}, must be a number above 0")
    if not isinstance(fields["date"], str) or not re.fullmatch(r"\d{4}-\d\d-\d\d", fields["date"]):
        raise ValueError(f"{place}.date: got {fields['date']!r}, must be YYYY-MM-DD")
    config = Config(
        _integers(fields["constants"], f"{place}.constants", least=0),
        **_integers({name: fields[name] for name in ("num_warps", "num_stages")}, place, least=1),
    )
    return Entry(_integers(fields["shape"], f"{place}.shape", least=0), config, float(time), fields["date"])


def _object(document: object, place: str, names: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise ValueError(f"{place}: got {document!r}, must be an object")
    if names is not None and set(document) != names:
        raise ValueError(f"{place}: has {sorted(document)}, must have {sorted(names)}")
    return document


def _integers(document: object, place: str, least: int) -> dict[str, int]:
    fields = _object(document, place)
    for name, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{place}.{name}: got {value!r}, must be a whole number of at least {least}")
    return fields


def distance(shape: Shape, other: Shape) -> float:
    """How many doublings lie between two shapes, over all their sizes; infinite if these differ in name."""
    if shape.keys() != other.keys():
        return math.inf
    return sum(abs(math.log2(max(shape[name], 0.5) / max(other[name], 0.5))) for name in shape)


def nearest(entries: list[Entry], operator: Operator, shape: Shape) -> Entry | None:
    """The entry of the nearest shape, of those whose config this shape's candidates have too."""
    valid = operator.candidates(shape)
    near = [entry for entry in entries if distance(shape, entry.shape) < math.inf and entry.config in valid]
    return min(near, key=lambda entry: distance(shape, entry.shape), default=None)


_chosen: dict[tuple[str, torch.device, tuple[tuple[str, int], ...]], Config] = {}


def config_for(operator: Operator, shape: Shape, device: torch.device) -> Config:
    """The config to launch with: the tuned one of this shape, else of the nearest, else the first candidate.

    What is not tuned is said once, in a warning. Costs a dictionary lookup once a shape has been seen.
    """
    key = (operator.name, device, tuple(shape.items()))
    if (config := _chosen.get(key)) is None:
        config = _chosen[key] = _choose(operator, shape, device)
    return config


def _choose(operator: Operator, shape: Shape, device: torch.device) -> Config:
    if device.type != "cuda":  # interpreted
        return operator.candidates(shape)[0]
    tuned = tuned_for(torch.cuda.get_device_name(device))
    entries = tuned.entries.get(operator.name, [])
    for entry in entries:
        if entry.shape == shape:
            return entry.config
    near = nearest(entries, operator, shape)
    layer = {name: size for name, size in shape.items() if name not in STEP_SIZES}
    what = f"{operator.name} is not tuned for {layer} on {tuned.device}"
    if near is None:
        _warn_once(f"{what}: it takes the default config")
        return operator.candidates(shape)[0]
    if any(near.shape[name] != size for name, size in layer.items()):
        _warn_once(f"{what}: it takes the config of a like shape")
    return near.config


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s; `fastserve-kernels tune` finds a better one", message)


@functools.cache
def tuned_for(device_name: str) -> TunedConfigs:
    """The tuned configs of a GPU: of its file, or none. Raises ValueError as `load`."""
    path = DIRECTORY / file_name(device_name)
    return load(path) if path.exists() else TunedConfigs(device_name, {})


def all_tuned(directory: Path = DIRECTORY) -> Mapping[str, TunedConfigs]:
    """The contents of every file there, by file name."""
    return {path.name: load(path) for path in sorted(directory.glob("*.json"))}
