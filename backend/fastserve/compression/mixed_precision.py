"""Bits for each linear, to a given average: few where the model's predictions bear it.

What a width costs a linear is estimated by `sensitivity.py` from the errors of its rounding, each weighted by
what `gptq.py` leaves of it. Bits are then given out one width at a time to whoever gains most by a bit. The
rounding itself is that of `gptq.py`.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor
from transformers import PretrainedConfig

from fastserve.compression.gptq import Gptq
from fastserve.compression.gram import damped, inverse_factor
from fastserve.compression.grid import search
from fastserve.compression.importance import measured
from fastserve.compression.layer import Layer
from fastserve.compression.quantizing_step import Bits
from fastserve.compression.sensitivity import Sensitivity
from fastserve.compression.state import State, StateWriter, read_notes
from fastserve.compression.step import Context, RecipeError

RATIOS = (1.0, 0.9, 0.8, 0.7)
"""Of ranges, in an estimate: `grid.RATIOS` would take longer and change little."""
ROWS = 256
"""Of a linear, at least, evenly spread, that an estimate rounds."""


def allocate(
    costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], bits: float
) -> dict[str, int]:
    """Bits for each name, `bits` on average over the sizes at most.

    `costs` has for each name what each width costs. All begin with the least; the next wider one is given to
    whoever gains most for each bit of its size. A name for which it would be too much keeps what it has.
    Gains are taken over the convex hull of the costs, on which this is optimal but for the last step.
    """
    steps = {name: _hull(of_name) for name, of_name in costs.items()}
    given = {name: widths[0] for name, widths in steps.items()}
    left = bits * sum(sizes.values()) - sum(given[name] * size for name, size in sizes.items())
    queue = [entry for name in costs if (entry := _next(name, costs[name], steps[name], 0, sizes[name]))]
    heapq.heapify(queue)
    while queue:
        _, name, position = heapq.heappop(queue)
        widths = steps[name]
        price = (widths[position] - given[name]) * sizes[name]
        if price > left:
            continue
        left -= price
        given[name] = widths[position]
        if entry := _next(name, costs[name], widths, position, sizes[name]):
            heapq.heappush(queue, entry)
    return given


def _hull(costs: Mapping[int, float]) -> list[int]:
    """The widths, ascending, from each of which the next one gains less per bit than the one before."""
    hull: list[int] = []
    for width in sorted(costs):
        while len(hull) > 1 and _gain(costs, hull[-2], hull[-1]) <= _gain(costs, hull[-1], width):
            hull.pop()
        hull.append(width)
    return hull


def _gain(costs: Mapping[int, float], narrow: int, wide: int) -> float:
    """Per bit."""
    return (costs[narrow] - costs[wide]) / (wide - narrow)


def _next(
    name: str, costs: Mapping[int, float], widths: list[int], position: int, size: int
) -> tuple[float, str, int] | None:
    """The step to the next width, greatest gain first; None if there is none, or nothing to gain."""
    if position + 1 == len(widths):
        return None
    gain = _gain(costs, widths[position], widths[position + 1]) / size
    return (-gain, name, position + 1) if gain > 0 else None


class MixedPrecision(Gptq, frozen=True, kw_only=True, tag="mixed_precision"):
    """Rounds linears as `gptq` does, each to as many bits as it needs."""

    bits: Annotated[float, Meta(ge=2, le=8, description="of a code, on average over all weights")] = 4.0  # type: ignore[assignment]
    widths: Annotated[tuple[Bits, ...], Meta(min_length=2, description="to choose from")] = (2, 3, 4, 5, 6, 8)

    def check(self, config: PretrainedConfig) -> None:
        super().check(config)
        if not min(self.widths) <= self.bits <= max(self.widths):
            raise RecipeError(f"bits: got {self.bits}; allowed: what lies between the widths {self.widths}")

    def run(self, before: State, after: StateWriter, context: Context) -> None:
        costs: dict[str, dict[int, float]] = {}

        def estimate(index: int, found: dict[str, Sensitivity]) -> None:
            for local, weight in before.linears(index).items():
                name = f"{before.skeleton.prefix}{index}.{local}"
                if self.selects(name):
                    costs[name] = self._costs_of(weight.dequantize().to(context.device), found[local])
            if index == 0:
                after.note("bits", allocate(costs, self._sizes(before), self.bits))

        measured(before, after, context, estimate)
        given = read_notes(after.directory)["bits"]
        rounding = _Allocated(
            **{name: getattr(self, name) for name in Gptq.__struct_fields__ if name != "bits"}, given=given
        )
        rounding.run(before, after, context)

    def _costs_of(self, weight: Tensor, sensitivity: Sensitivity) -> dict[int, float]:
        every = max(1, len(weight) // ROWS)
        weight, slopes = weight[::every], sensitivity.rows[::every]
        gram = damped(sensitivity.gram, self.damping)
        remaining = inverse_factor(gram).diagonal().square().reciprocal()
        group_size = self.group_size or weight.shape[1]
        costs: dict[int, float] = {}
        for width in self.widths:
            grid = search(weight, width, group_size, self.symmetric, torch.float32, remaining, RATIOS)
            errors = (grid.values(grid.nearest(weight)) - weight).square() @ remaining
            costs[width] = float(errors @ slopes) * every / 2
        return costs

    def _sizes(self, before: State) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for index in range(before.num_layers):
            for local, weight in before.linears(index).items():
                name = f"{before.skeleton.prefix}{index}.{local}"
                if self.selects(name):
                    sizes[name] = weight.out_features * weight.in_features
        return sizes


class _Allocated(Gptq, frozen=True, kw_only=True, tag="mixed_precision"):
    """With the bits of each linear, by full name."""

    given: dict[str, int]

    def compress(self, layer: Layer, names: tuple[str, ...]) -> None:
        for name in layer.in_order(names):
            self.compress_linear(layer, name, self.given[f"{layer.prefix}{name}"])
