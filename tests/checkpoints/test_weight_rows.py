"""Weights one below the other: the rows of each, of whatever format."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastserve.checkpoints.weight_rows import stack_rows
from fastserve_kernels import formats

MAKERS: dict[str, Callable[[Tensor], formats.Weight]] = {
    "dense": formats.Dense,
    "int4": lambda w: formats.Int4.pack(w, 32, symmetric=False),
    "int8": lambda w: formats.Int8.pack(w, 64),
    "int rows": lambda w: formats.IntRows.pack(w, (2 + torch.arange(len(w)) % 7).byte(), 64),
    "int rows with zeros": lambda w: formats.IntRows.pack(
        w, (8 - torch.arange(len(w)) % 7).byte(), 64, False
    ),
    "nf4": lambda w: formats.NF4.pack(w, 64),
    "fp8": formats.FP8.pack,
    "w8a8": formats.W8A8.pack,
    "sparse24": formats.Sparse24.pack,
    "sparse24 int4": lambda w: formats.Sparse24Int4.pack(w, 32),
    "blocks": lambda w: formats.BlockSparse.pack(w, (16, 32), 0.5),
    "bitmap": lambda w: formats.Bitmap.pack(w, density=0.5),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_weights_of_a_kind_become_one(maker: str) -> None:
    parts = [MAKERS[maker](torch.randn(rows, 128)) for rows in (48, 16, 32)]
    (stacked,) = stack_rows(parts)
    assert type(stacked) is type(parts[0])
    assert torch.equal(stacked.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_neighbours_of_a_kind_become_one() -> None:
    def made(*names: str) -> list[formats.Weight]:
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
        [formats.Int4.pack(w, 32), formats.Int4.pack(w, 64)],
        [formats.Int4.pack(w, 32), formats.Int4.pack(w, 32, symmetric=False)],
        [formats.IntRows.pack(w, bits, 32), formats.IntRows.pack(w, bits, 64)],
        [formats.IntRows.pack(w, bits, 32), formats.IntRows.pack(w, bits, 32, symmetric=False)],
        [formats.NF4.pack(w), formats.NF4.pack(w, codebook=codebook)],
        [formats.LowRank.pack(w, 4), formats.LowRank.pack(w, 4)],
        [formats.Dense(w), formats.Dense(w.half())],
        [formats.BlockSparse.pack(w, (16, 32)), formats.BlockSparse.pack(w, (16, 16))],
    ):
        assert stack_rows(parts) == parts
