"""Mixed precision: bits for each row, or each linear, to a given average; few where predictions bear it.

What a width costs a row is estimated by `sensitivity.py` from the errors of its rounding, each weighted by
what `gptq.py` leaves of it. All then pay the same price for a bit, the least that the average allows. The
rounding itself is that of `gptq.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import Tensor
from transformers import PretrainedConfig

from fastserve.compression.calibration.hessian import damped, inverse_factor
from fastserve.compression.calibration.importance import measure_importance
from fastserve.compression.calibration.layer import Layer
from fastserve.compression.calibration.sensitivity import Sensitivity
from fastserve.compression.errors import RecipeError
from fastserve.compression.quantization.gptq import Gptq, gptq_quantize
from fastserve.compression.quantization.grid import search
from fastserve.compression.quantization.quantizing_step import Bits
from fastserve.compression.sparsity_patterns import mask_of
from fastserve.compression.state.model_state import SCRATCH, State, StateWriter, read_part, write_part
from fastserve.compression.step import Context
from fastserve_kernels.formats import IntRows, Weight
from fastserve_kernels.formats.int_rows import rows_by_width

FILE = f"{SCRATCH}bits.safetensors"
RATIOS = (1.0, 0.9, 0.8, 0.7)
"""Clipping that an estimate tries: `grid.CLIP_RATIOS` would take longer and change little."""
BITS_OF_A_WIDTH = 8
"""Bits that `IntRows` needs to store the width of a row."""
BISECTIONS = 100


def allocate(costs: Tensor, sizes: Tensor, widths: Tensor, budget: float) -> Tensor:
    """Bits for each of U units, the sum of bits times sizes within a budget.

    `costs` [U, W] float64 is what each of the `widths` [W], ascending, costs each unit, of `sizes` [U]. The
    result [U] has the least sum of costs of all choices that need no more than it does (Everett's theorem:
    every unit has the width of least cost + price * bits, and the price of a bit is the same for all). Raises
    ValueError if the narrowest width is beyond the budget for all.
    """

    def at(price: float) -> Tensor:
        return widths[(costs + price * widths * sizes[:, None]).argmin(1)]

    def fits(given: Tensor) -> bool:
        return float((given * sizes).sum()) <= budget

    low, high = 0.0, 1.0
    if fits(at(low)):
        return at(low)
    if not fits(widths[:1].expand(len(costs))):
        raise ValueError(f"budget: got {budget}; allowed: at least {float(widths[0] * sizes.sum())}")
    while not fits(at(high)):
        high *= 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(at(middle)) else (middle, high)
    return at(high)


class MixedPrecision(Gptq, frozen=True, kw_only=True, tag="mixed_precision"):
    """Rounds linears as `gptq` does, each row to as many bits as it needs."""

    bits: Annotated[float, Meta(ge=2, le=8, description="bits of a code, on average over all weights")] = 4.0  # type: ignore[assignment]
    widths: Annotated[tuple[Bits, ...], Meta(min_length=2, description="to choose from")] = (2, 3, 4, 5, 6, 8)
    per: Annotated[
        Literal["row", "linear"],
        Meta(description="what has bits of its own; other loaders know linears only"),
    ] = "row"

    def check(self, config: PretrainedConfig) -> None:
        """Raises RecipeError if `bits` does not lie between the widths, or a linear cannot be quantized."""
        super().check(config)
        if not min(self.widths) <= self.bits <= max(self.widths):
            raise RecipeError(f"bits: got {self.bits}; allowed: what lies between the widths {self.widths}")

    def dummy_output(self, weight: Weight, dtype: torch.dtype) -> Weight:
        """Rows of the two widths around `bits`, as many of each as give that average."""
        dense, widths = weight.dequantize().to(dtype), sorted(self.widths)
        codes = float(self._sizes((1, dense.shape[1])))
        bits = self.bits if self.per == "linear" else max(self.bits - BITS_OF_A_WIDTH / codes, widths[0])
        low, high = max(w for w in widths if w <= bits), min(w for w in widths if w >= bits)
        wide = 0 if low == high else round(len(dense) * (bits - low) / (high - low))
        given = torch.tensor([high] * wide + [low] * (len(dense) - wide), dtype=torch.uint8)
        return IntRows.pack(dense, given, self.group_size, self.symmetric)

    def run(self, before: State, after: StateWriter, context: Context) -> None:
        """Allocates bits by sensitivity, then quantizes with GPTQ layer by layer."""
        costs: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, int]] = {}

        def estimate(index: int, found: dict[str, Sensitivity]) -> None:
            for local, weight in before.linears(index).items():
                name = f"{before.meta_model.prefix}{index}.{local}"
                if self.selects(name):
                    costs[name] = self._costs_of(weight.dequantize().to(context.device), found[local])
                    shapes[name] = weight.out_features, weight.in_features
            if index == 0:
                write_part(after.directory / FILE, self._allocated(costs, shapes))

        measure_importance(before, after, context, estimate)
        given = dict(read_part(after.directory / FILE))
        fields = {name: getattr(self, name) for name in Gptq.__struct_fields__ if name != "bits"}
        _Allocated(**fields, per=self.per, given=given).run(before, after, context)

    def _costs_of(self, weight: Tensor, sensitivity: Sensitivity) -> Tensor:
        """Nats [N, W] that each width costs a row, or [1, W] the linear."""
        hessian = damped(sensitivity.hessian, self.damping)
        remaining = inverse_factor(hessian).diagonal().square().reciprocal()
        group_size = self.group_size or weight.shape[1]
        costs = []
        for width in sorted(self.widths):
            grid = search(weight, width, group_size, self.symmetric, torch.float32, remaining, RATIOS)
            errors = (grid.dequantize(grid.quantize(weight)) - weight).square() @ remaining
            costs.append((errors * sensitivity.rows / 2).double())
        of_rows = torch.stack(costs, 1)
        return of_rows if self.per == "row" else of_rows.sum(0, keepdim=True)

    def _allocated(
        self, costs: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]
    ) -> dict[str, Tensor]:
        """Bits [N] uint8 of the rows of each linear."""
        units = [len(of_linear) for of_linear in costs.values()]
        sizes = torch.cat([self._sizes(shape).view(len(costs[n]), -1).sum(1) for n, shape in shapes.items()])
        widths = torch.tensor(sorted(self.widths), device=sizes.device, dtype=torch.float64)
        # What a row needs to say how many bits it has is no part of its codes.
        spent = BITS_OF_A_WIDTH * len(sizes) if self.per == "row" else 0
        budget = max(self.bits * float(sizes.sum()) - spent, float(widths[0] * sizes.sum()))
        given = allocate(torch.cat(list(costs.values())).cpu(), sizes, widths, budget).byte()
        return {
            name: bits.expand(shapes[name][0]).contiguous() if self.per == "linear" else bits.clone()
            for name, bits in zip(costs, given.split(units), strict=True)
        }

    def _sizes(self, shape: tuple[int, int]) -> Tensor:
        """Codes and zero points of each row of a linear, [N] float64."""
        rows, columns = shape
        groups = 0 if self.symmetric else columns // (self.group_size or columns)
        return torch.full((rows,), columns + groups, dtype=torch.float64)


class _Allocated(Gptq, frozen=True, kw_only=True, tag="mixed_precision"):
    """GPTQ with the bits [N] uint8 of each linear's rows, by full name."""

    per: str
    given: dict[str, Any]

    def compress(self, layer: Layer, names: tuple[str, ...]) -> None:
        for name in layer.in_order(names):
            bits = self.given[f"{layer.prefix}{name}"].to(layer.dense(name).device)
            if self.per == "linear":
                self.compress_linear(layer, name, int(bits[0]))
            else:
                self._compress_rows(layer, name, bits)

    def _compress_rows(self, layer: Layer, name: str, bits: Tensor) -> None:
        weight, hessian = self.rounding_target(layer, name)
        mask = mask_of(layer.weight(name))
        group_size = self.group_size or weight.shape[1]
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        scales = weight.new_empty(len(weight), weight.shape[1] // group_size, dtype=layer.dtype)
        zeros = None if self.symmetric else torch.empty_like(scales)
        for width, rows in rows_by_width(bits):
            of_rows = None if mask is None else mask[rows]
            grid, found = gptq_quantize(
                weight[rows], hessian, width, group_size, self.symmetric, layer.dtype, of_rows
            )
            codes[rows], scales[rows] = found.byte(), grid.scales
            if zeros is not None and grid.zeros is not None:
                zeros[rows] = grid.zeros
        packed = IntRows.from_codes(codes, bits, scales, zeros)
        self.put(layer, name, packed, layer.moments(name).mean)
