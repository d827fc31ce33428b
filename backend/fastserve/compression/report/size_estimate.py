"""The estimated size of a result, from shapes and formats alone, before anything is computed.

A strip of each kind of linear is taken through the steps: packed as they would pack it, its values of no use,
and stored as the export would store it. What all rows of a linear have alike need not be measured on all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fastserve.compression.recipe import Recipe
from fastserve.compression.state.encoders import CompressedTensorsEncoder, Encoder, OwnEncoder, expressible
from fastserve.compression.state.meta_model import MetaModel
from fastserve.compression.state.model_state import State
from fastserve.compression.step import Step
from fastserve_kernels.formats import Dense, Weight

ROWS = 128
"""Rows of a strip: the height of the tallest block that a pattern has."""


def estimated_bytes(recipe: Recipe, source: State) -> int | None:
    """Bytes of the weights on disk after a recipe that `check_recipe` lets pass; None: only its run can tell.

    `source` is the model as it came.
    """
    config, dtype = source.config, source.dtype
    for step in recipe.steps:
        config = step.config_after(config)
    meta_model = MetaModel.of(config)
    parts = dict(_parts(meta_model))
    made: dict[tuple[object, ...], Weight | None] = {}
    strips: dict[str, Weight] = {}
    total = 0
    for name, (shape, is_outer) in parts.items():
        if len(shape) != 2:
            total += torch.Size(shape).numel() * dtype.itemsize
            continue
        steps = [step for step in recipe.steps if (step.changes_outer if is_outer else step.selects(name))]
        key = (shape, *map(id, steps))
        if key not in made:
            made[key] = _strip(shape, steps, dtype)
        strip = made[key]
        if strip is None:
            return None
        strips[name] = strip
    suits = all(expressible(name, strip) for name, strip in strips.items())
    encoder: Encoder = CompressedTensorsEncoder() if suits else OwnEncoder()
    for name, strip in strips.items():
        stored = sum(tensor.nbytes for tensor in encoder.encode(name, strip).values())
        total += stored * parts[name][0][0] // strip.out_features
    return total


def _parts(meta_model: MetaModel) -> Iterator[tuple[str, tuple[tuple[int, ...], bool]]]:
    """Each module that is a matrix, and each other tensor, by full name: its shape, and whether it is outside
    the layers."""
    tensors = meta_model.model.state_dict()
    for name in meta_model.outer_tensors():
        yield name.removesuffix(".weight"), (tuple(tensors[name].shape), True)
    for index in range(meta_model.num_layers):
        for local in meta_model.tensors(index):
            name = f"{meta_model.prefix}{index}.{local}"
            yield name.removesuffix(".weight"), (tuple(tensors[name].shape), False)


def _strip(shape: tuple[int, ...], steps: Sequence[Step], dtype: torch.dtype) -> Weight | None:
    """A dummy weight of min(N, ROWS) rows of a matrix [N, K] after the steps."""
    generator = torch.Generator().manual_seed(0)
    strip: Weight | None = Dense(torch.randn(min(shape[0], ROWS), shape[1], generator=generator).to(dtype))
    for step in steps:
        if strip is not None:
            strip = step.dummy_output(strip, dtype)
    return strip
