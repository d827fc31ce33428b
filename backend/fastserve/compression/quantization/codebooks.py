"""Codebook (non-linear) quantization: sixteen values of any size, times a scale of the group."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor

from fastserve.compression.calibration.layer import Layer
from fastserve.compression.quantization.quantizing_step import GroupSize, QuantizingStep
from fastserve_kernels.formats import NF4, NORMAL_FLOAT_4, Weight
from fastserve_kernels.formats.weight import pack_pairs, spread, unpack_pairs

ITERATIONS = 20
"""Iterations of k-means; the last ones hardly change anything."""


def k_means(weight: Tensor, group_size: int, costs: Tensor, dtype: torch.dtype) -> NF4:
    """A weight [N, K] with the codebook of its own for which the sum of costs_k d_k^2 is least.

    d is what rounding changes, `costs` is [K], K is even. Lloyd's algorithm, from the codebook of NF4 on: the
    nearest entry of each weight, the best entries for these, the best scale [N, K / G] of each group then.
    """
    weight = weight.float()
    packed = NF4.pack(weight, group_size, scale_dtype=torch.float32)
    codes, scales, codebook = unpack_pairs(packed.codes).long(), packed.scales, packed.codebook
    for _ in range(ITERATIONS):
        per_column = spread(scales, group_size)
        codebook = _entries(weight, codes, per_column, costs, codebook)
        codes = _nearest(weight / per_column, codebook)
        scales = _scales(weight, codebook[codes], costs, scales)
    scales = scales.to(dtype)
    codes = _nearest(weight / spread(scales, group_size), codebook)
    return NF4(pack_pairs(codes), scales, codebook, group_size)


def _entries(weight: Tensor, codes: Tensor, scales: Tensor, costs: Tensor, before: Tensor) -> Tensor:
    """The best value of each entry, ascending; one that nobody uses stays."""
    size = len(before)
    above = torch.bincount(codes.flatten(), (costs * scales * weight).flatten(), size)
    below = torch.bincount(codes.flatten(), (costs * scales.square()).flatten(), size)
    return torch.where(below > 0, above / below, before).sort().values


def _nearest(values: Tensor, codebook: Tensor) -> Tensor:
    """The indices of the nearest entries of an ascending codebook."""
    return torch.bucketize(values, (codebook[:-1] + codebook[1:]) / 2)


def _scales(weight: Tensor, entries: Tensor, costs: Tensor, before: Tensor) -> Tensor:
    """The best scale [N, K / G] of each group; where that would not be above 0 it stays."""
    groups = (*before.shape, -1)
    above = (costs * weight * entries).view(groups).sum(-1)
    below = (costs * entries.square()).view(groups).sum(-1)
    return torch.where((above > 0) & (below > 0), above / below, before)


class Codebook(QuantizingStep, frozen=True, kw_only=True, tag="codebook"):
    """Gives every weight the nearest of sixteen values, times a scale."""

    codebook: Annotated[
        Literal["nf4", "k-means"], Meta(description="QLoRA's for normal weights, or one for each linear")
    ] = "nf4"
    group_size: GroupSize = 64

    @property
    def measures(self) -> bool:
        """True for k-means, whose columns are weighted, and for bias correction."""
        return self.codebook == "k-means" or self.bias_correction

    def dummy_output(self, weight: Weight, dtype: torch.dtype) -> Weight:
        """The weight as NF4, which k-means has the size of."""
        return NF4.pack(weight.dequantize(), self.group_size, scale_dtype=dtype)

    def compress(self, layer: Layer, names: tuple[str, ...]) -> None:
        """Quantizes the linears of these names to NF4 or to a codebook of their own."""
        for name in layer.in_order(names):
            weight, moments = layer.dense(name), layer.moments(name)
            group_size = self.group_size or weight.shape[1]
            if self.codebook == "nf4":
                codebook = torch.tensor(NORMAL_FLOAT_4, device=weight.device)
                packed = NF4.pack(weight, group_size, codebook, layer.dtype)
            else:
                packed = k_means(weight, group_size, moments.hessian.diagonal(), layer.dtype)
            self.put(layer, name, packed, moments.mean)
