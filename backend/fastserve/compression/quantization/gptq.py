"""Rounding with second-order correction: GPTQ (Frantar et al., arXiv 2210.17323), for inputs that drift.

Columns are rounded one after the other, those of the largest inputs first (act order); what rounding one
costs the output is made up for by those still to come. The groups' grids are chosen before, so that columns
keep their groups. Where the inputs are no longer those of the model before the step, because earlier layers
are rounded already, the target is the weight that maps what comes now to what came out then (as GPTAQ has it,
arXiv 2504.02692). Codes and scales are refined afterwards (`refinement.py`).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from msgspec import Meta
from torch import Tensor

from fastserve.compression.calibration.hessian import Damping, Drift, damped, drift_corrected, inverse_factor
from fastserve.compression.calibration.layer import Layer
from fastserve.compression.quantization.grid import Grid, search
from fastserve.compression.quantization.quantizing_step import Bits, GroupSize, QuantizingStep
from fastserve.compression.quantization.refinement import COLUMNS, refine
from fastserve.compression.sparsity_patterns import mask_of
from fastserve_kernels.formats import Int4, Sparse24, Sparse24Int4, Weight
from fastserve_kernels.formats.weight import GROUP_SIZES, pack_pairs, unpack_pairs


def round_columns(
    weight: Tensor, factor: Tensor, order: Tensor, grid: Grid, mask: Tensor | None = None
) -> Tensor:
    """The codes [N, K] of a weight [N, K]; where the mask is false they are those of 0.

    `factor` [K, K] is the upper Cholesky factor of the inverse of the Hessian, whose rows and
    columns are in the `order` [K] in which columns are rounded.
    """
    scales, zeros = (tensor[:, order].T.contiguous() for tensor in grid.per_weight())
    left = weight[:, order].T.contiguous()
    free = None if mask is None else mask[:, order].T
    codes = torch.empty_like(left)
    largest = 2**grid.bits - 1
    for start in range(0, len(left), COLUMNS):
        stop = min(start + COLUMNS, len(left))
        errors = torch.empty_like(left[start:stop])
        for column in range(start, stop):
            code = (left[column] / scales[column] + zeros[column]).round_().clamp_(0, largest)
            if free is not None:
                code = torch.where(free[column], code, zeros[column])
            value = (code - zeros[column]) * scales[column]
            error = (left[column] - value) / factor[column, column]
            left[column + 1 : stop] -= factor[column, column + 1 : stop, None] * error
            codes[column], errors[column - start] = code, error
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return codes.T[:, order.argsort()].contiguous()


def gptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    mask: Tensor | None = None,
    turns: int = 2,
) -> tuple[Grid, Tensor]:
    """A grid and codes [N, K] for a weight [N, K] and a Hessian [K, K] that has an inverse.

    The grid is chosen by what an error d in a column costs once the columns after it have made up for it:
    d^2 / U_kk^2, with U the factor of `round_columns`.
    """
    order = hessian.diagonal().argsort(descending=True)
    factor = inverse_factor(hessian[order][:, order])
    costs = (1 / factor.diagonal().square())[order.argsort()]
    grid = search(weight, bits, group_size, symmetric, dtype, costs)
    codes = round_columns(weight, factor, order, grid, mask)
    return refine(weight, hessian, grid, codes, mask, turns)


class Gptq(QuantizingStep, frozen=True, kw_only=True, tag="gptq"):
    """Rounds linears one by one column, each making up for those before it and for the layers before it."""

    with_reference: ClassVar[bool] = True
    weights_tokens: ClassVar[bool] = True

    bits: Bits = 4
    group_size: GroupSize = 64
    symmetric: Annotated[bool, Meta(description="no zero points")] = False
    damping: Damping = 0.01
    drift: Drift = 0.5

    def dummy_output(self, weight: Weight, dtype: torch.dtype) -> Weight:
        """The weight rounded to nearest."""
        dense = weight.dequantize()
        grid = Grid.min_max(dense, self.bits, self.group_size or dense.shape[1], dtype, self.symmetric)
        return pack(grid, grid.quantize(dense), weight)

    def compress(self, layer: Layer, names: tuple[str, ...]) -> None:
        """Quantizes the linears of these names, in the order in which they run."""
        for name in layer.in_order(names):
            self.compress_linear(layer, name, self.bits)

    def compress_linear(self, layer: Layer, name: str, bits: int) -> None:
        """Rounds one linear."""
        weight = layer.weight(name)
        dense, hessian = self.rounding_target(layer, name)
        group_size = self.group_size or dense.shape[1]
        grid, codes = gptq_quantize(
            dense, hessian, bits, group_size, self.symmetric, layer.dtype, mask_of(weight)
        )
        self.put(layer, name, pack(grid, codes, weight), layer.moments(name).mean)

    def rounding_target(self, layer: Layer, name: str) -> tuple[Tensor, Tensor]:
        """The weight [N, K] that a linear is to be rounded to, and the damped Hessian [K, K] of its
        inputs."""
        weight, moments = layer.dense(name), layer.moments(name)
        hessian = damped(moments.hessian, self.damping)
        if moments.drift is not None:
            weight = drift_corrected(weight, hessian, moments.drift, self.drift)
        return weight, hessian


def pack(grid: Grid, codes: Tensor, like: Weight) -> Weight:
    """Codes [N, K] in the format for the pattern of the weight that they stand for.

    2:4 stays packed where the format can hold the codes: of 4 bits at most, symmetric, in groups.
    """
    packed = grid.pack(codes)
    if not isinstance(like, Sparse24) or not isinstance(packed, Int4):
        return packed
    holds = packed.zeros is None and packed.group_size in GROUP_SIZES
    return _two_of_four(packed, like.indices) if holds else packed


def _two_of_four(weight: Int4, indices: Tensor) -> Sparse24Int4:
    """The codes of the columns that `Sparse24.indices` names."""
    first = torch.stack((indices & 15, indices >> 4), -1).flatten(1)
    columns = (
        torch.stack((first & 3, first >> 2), -1)
        + 4 * torch.arange(first.shape[1], device=first.device)[:, None]
    )
    kept = unpack_pairs(weight.codes).gather(1, columns.flatten(1).long())
    return Sparse24Int4(pack_pairs(kept), indices, weight.scales, weight.group_size)
