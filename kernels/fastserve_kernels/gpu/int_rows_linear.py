"""`linear_int_rows`: rows of 4 bits and rows of 8, by the kernels of `linear_int4` and `linear_int8`.

Two launches, and two more to put the outputs into order: what one kernel would save has not been measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve_kernels.formats import Int4, Int8, IntRows
from fastserve_kernels.formats.prepared import IntRowsArguments, Prepared
from fastserve_kernels.gpu.int4_linear import linear_int4
from fastserve_kernels.gpu.int8_linear import linear_int8


def prepare(weight: IntRows, device: torch.device, dtype: torch.dtype) -> Prepared:
    """The two parts as their kernels read them. Raises ValueError if the GPU is too old."""
    on_device = weight.to(device)

    def pack(part: Int4 | Int8) -> tuple[Tensor | int | None, ...]:
        linear = linear_int4 if isinstance(part, Int4) else linear_int8
        return linear.prepare(part, device, dtype).arguments

    arguments = on_device.arguments_of(pack)
    return Prepared(weight.operator, arguments, weight.out_features, weight.in_features)


def linear_int_rows(
    x: Tensor, weight: IntRowsArguments, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """`reference.linear_int_rows` on a GPU."""
    narrow, narrow_scales, narrow_zeros, wide, wide_scales, wide_zeros, rows, *sizes = weight
    out_features, narrow_rows, group_size = sizes

    def part(tensor: Tensor | None, of_part: slice) -> Tensor | None:
        return None if tensor is None else tensor[..., rows[of_part]]

    few, many = slice(narrow_rows), slice(narrow_rows, None)
    parts = []
    if narrow is not None and narrow_scales is not None:
        of_narrow = (narrow, narrow_scales, narrow_zeros, narrow_rows, group_size)
        parts.append(linear_int4(x, of_narrow, part(bias, few), part(residual, few)))
    if wide is not None and wide_scales is not None:
        of_wide = (wide, wide_scales, wide_zeros, out_features - narrow_rows, group_size)
        parts.append(linear_int8(x, of_wide, part(bias, many), part(residual, many)))
    came = torch.cat(parts, dim=1)
    return torch.empty_like(came).index_copy_(1, rows, came)
