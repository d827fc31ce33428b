"""What the Triton kernels are called by: an operator's implementation, a format's packing, and the entries by
which kernels are compiled ahead, tuned and measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastserve_kernels import formats, reference
from fastserve_kernels.formats.prepared import Prepared
from fastserve_kernels.formats.weight import Weight
from fastserve_kernels.gpu import (
    attention,
    bitmap,
    block_sparse,
    int4_linear,
    int8_linear,
    int_rows_linear,
    kv_write,
    low_rank,
    norms,
    sampling,
    sparse24,
    swiglu,
    varlen_attention,
    w8a8,
)
from fastserve_kernels.gpu.operator import Operator

IMPLEMENTATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    reference.linear_int4: int4_linear.linear_int4,
    reference.linear_int8: int8_linear.linear_int8,
    reference.linear_int_rows: int_rows_linear.linear_int_rows,
    reference.linear_nf4: int4_linear.linear_nf4,
    reference.linear_fp8: int8_linear.linear_fp8,
    reference.linear_w8a8: w8a8.linear_w8a8,
    reference.linear_sparse24: sparse24.linear_sparse24,
    reference.linear_sparse24_int4: sparse24.linear_sparse24_int4,
    reference.linear_block_sparse: block_sparse.linear_block_sparse,
    reference.linear_bitmap: bitmap.linear_bitmap,
    reference.linear_low_rank: low_rank.linear_low_rank,
    reference.rms_norm: norms.rms_norm,
    reference.add_rms_norm: norms.add_rms_norm,
    reference.swiglu: swiglu.swiglu,
    reference.rotary: kv_write.rotary,
    reference.write_kv: kv_write.write_kv,
    reference.rotary_write_kv: kv_write.rotary_write_kv,
    reference.paged_attention: attention.paged_attention,
    reference.varlen_attention: varlen_attention.varlen_attention,
    reference.sample: sampling.sample,
    reference.log_probs: sampling.log_probs,
}
"""What an operator does on a GPU, by its function in `reference`."""

PREPARE: Mapping[type[Weight], Callable[[Any, torch.device, torch.dtype], Prepared]] = {
    formats.Int4: int4_linear.linear_int4.prepare,
    formats.Int8: int8_linear.linear_int8.prepare,
    formats.IntRows: int_rows_linear.prepare,
    formats.NF4: int4_linear.linear_nf4.prepare,
    formats.FP8: int8_linear.linear_fp8.prepare,
    formats.W8A8: w8a8.prepare,
    formats.Sparse24: sparse24.prepare,
    formats.Sparse24Int4: sparse24.prepare,
    formats.BlockSparse: block_sparse.prepare,
    formats.Bitmap: bitmap.prepare,
    formats.LowRank: low_rank.prepare,
}
"""What packs a weight for a GPU and activations of a dtype, by the weight's type."""

OPERATORS: Mapping[str, Operator] = {
    operator.name: operator
    for operator in (
        *int4_linear.OPERATORS,
        *int8_linear.OPERATORS,
        *w8a8.OPERATORS,
        *sparse24.OPERATORS,
        *block_sparse.OPERATORS,
        *bitmap.OPERATORS,
        *low_rank.OPERATORS,
        *norms.OPERATORS,
        *swiglu.OPERATORS,
        *kv_write.OPERATORS,
        *attention.OPERATORS,
        *varlen_attention.OPERATORS,
        *sampling.OPERATORS,
    )
}
"""What has kernels of its own, by name; `linear_int_rows` runs those of int4 and int8."""


def operators(names: Sequence[str] = ()) -> tuple[Operator, ...]:
    """The entries of these names, in that order; all of them if none is named.

    Raises ValueError for a name that no operator has.
    """
    for name in names:
        if name not in OPERATORS:
            raise ValueError(
                f"operator {name!r}: there is none of this name; there are {', '.join(OPERATORS)}"
            )
    return tuple(OPERATORS[name] for name in names or OPERATORS)
