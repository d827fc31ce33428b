"""Weights one below the other: the rows of each, of whatever format."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastserve.checkpoints.weight_rows import stack_rows
from fastserve_kernels.formats import (
    FP8,
    NF4,
    W8A8,
    Bitmap,
    BlockSparse,
    Dense,
    Int4,
    Int8,
    IntRows,
    LowRank,
    Sparse24,
    Sparse24Int4,
    Weight,
)

MAKERS: dict[str, Callable[[Tensor], Weight]] = {
    "dense": Dense,
    "int4": lambda w: Int4.pack(w, 32, symmetric=False),
    "int8": lambda w: Int8.pack(w, 64),
    "int rows": lambda w: IntRows.pack(w, (2 + torch.arange(len(w)) % 7).byte(), 64),
    "int rows with zeros": lambda w: IntRows.pack(w, (8 - torch.arange(len(w)) % 7).byte(), 64, False),
    "nf4": lambda w: NF4.pack(w, 64),
    "fp8": FP8.pack,
    "w8a8": W8A8.pack,
    "sparse24": Sparse24.pack,
    "sparse24 int4": lambda w: Sparse24Int4.pack(w, 32),
    "blocks": lambda w: BlockSparse.pack(w, (16, 32), 0.5),
    "bitmap": lambda w: Bitmap.pack(w, density=0.5),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_weights_of_a_kind_become_one(maker: str) -> None:
    parts = [MAKERS[maker](torch.randn(rows, 128)) for rows in (48, 16, 32)]
    (stacked,) = stack_rows(parts)
    assert type(stacked) is type(parts[0])
    assert torch.equal(stacked.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_neighbours_of_a_kind_become_one() -> None:
    def made(*names: str) -> list[Weight]:
        return [MAKERS[name](torch.randn(16, 128)) for name in names]

    parts = made("int4", "int4", "int8", "dense", "dense", "int4")
    stacked = stack_rows(parts)
    assert [weight.out_features for weight in stacked] == [32, 16, 32, 16]
    rows = torch.cat([weight.dequantize() for weight in stacked])
    assert torch.equal(rows, torch.cat([part.dequantize() for part in parts]))


def test_what_differs_in_a_group_size_a_codebook_or_a_matrix_stays_apart() -> None:
    w = torch.randn(16, 128)
    bits = torch.full((16,), 5, dtype=torch.uint8)
    codebook = torch.linspace(-1, 1, 16)
    for parts in (
        [Int4.pack(w, 32), Int4.pack(w, 64)],
        [Int4.pack(w, 32), Int4.pack(w, 32, symmetric=False)],
        [IntRows.pack(w, bits, 32), IntRows.pack(w, bits, 64)],
        [IntRows.pack(w, bits, 32), IntRows.pack(w, bits, 32, symmetric=False)],
        [NF4.pack(w), NF4.pack(w, codebook=codebook)],
        [LowRank.pack(w, 4), LowRank.pack(w, 4)],
        [Dense(w), Dense(w.half())],
        [BlockSparse.pack(w, (16, 32)), BlockSparse.pack(w, (16, 16))],
    ):
        assert stack_rows(parts) == parts
