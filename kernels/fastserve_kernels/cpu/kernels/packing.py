"""Weights in the order in which the kernels of `linear` read them.

Rows are dealt out to *panels* of 32, two vectors of 16, and the last panel is filled up. A panel's vectors of
64 bytes follow each other in the order of the columns, for each columns the first 16 rows' and then the
others'; what is in a vector is told in `words`. Columns are filled up too, and meet activations of 0 there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve_kernels.cpu.kernels import cpu_features
from fastserve_kernels.cpu.kernels.huge_pages import in_huge_pages

VECTOR_ROWS, PANEL_VECTORS = 16, 2
PANEL_ROWS = VECTOR_ROWS * PANEL_VECTORS
"""Rows."""
BLOCK = 128
"""Columns of the blocks of a matrix that is whole."""


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """With zeros for what is missing to a multiple of rows and of columns."""
    missing = -matrix.shape[0] % rows, -matrix.shape[1] % columns
    return torch.nn.functional.pad(matrix, (0, missing[1], 0, missing[0]))


def _in_vectors(matrix: Tensor, columns: int) -> Tensor:
    """[N, K] as [panels, K / columns, PANEL_VECTORS, VECTOR_ROWS, columns]."""
    return (
        matrix.unflatten(1, (-1, columns))
        .unflatten(0, (-1, PANEL_VECTORS, VECTOR_ROWS))
        .permute(0, 3, 1, 2, 4)
        .contiguous()
    )


def nibbles(codes: Tensor) -> Tensor:
    """Codes [N, K] uint8 from 0 to 15 as [panels, K / 8, 2, 16, 4] uint8."""
    eight = _in_vectors(_padded(codes, PANEL_ROWS, 32), 8)
    return eight[..., [0, 4, 1, 5]] | eight[..., [2, 6, 3, 7]] << 4


def codes(values: Tensor) -> Tensor:
    """Codes [N, K] uint8 as [panels, K / 4, 2, 4, 2, 4, 2] uint8: four rows' two columns, then their next
    two."""
    four = _in_vectors(_padded(values, PANEL_ROWS, 32), 4)
    return four.unflatten(4, (2, 2)).unflatten(3, (4, 4)).transpose(4, 5).contiguous()


def quad_excess() -> int:
    """What a byte of a quad is more than its value: VNNI takes weights without a sign (`byte_products`)."""
    return 128 if cpu_features.has_vnni() else 0


def quads(values: Tensor, columns: int = 64) -> Tensor:
    """int8 [N, K], with K filled up to a multiple of `columns`, as [panels, K / 4, 2, 16, 4] uint8: each
    value + `quad_excess()`."""
    return _in_vectors(_padded(values.view(torch.uint8) ^ quad_excess(), PANEL_ROWS, columns), 4)


def group_rows(per_group: Tensor) -> Tensor:
    """Scales or zeros [N, groups] as [panels, groups, 32]."""
    return _padded(per_group, PANEL_ROWS, 1).unflatten(0, (-1, PANEL_ROWS)).transpose(1, 2).contiguous()


def word_dtype(dtype: torch.dtype) -> torch.dtype:
    """What weights are that meet activations of this dtype: bfloat16 for themselves, else float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _word_columns(dtype: torch.dtype) -> int:
    return 4 // word_dtype(dtype).itemsize


def blocks(values: Tensor, row_starts: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks [B, bn, bk] as many, in words: those of a block row one after another for its first panel, then
    for its next one. bn is a multiple of 32."""
    of_rows = []
    for found in values.to(word_dtype(dtype)).split(row_starts.diff().tolist()):
        panels = found.unflatten(2, (-1, _word_columns(dtype))).unflatten(1, (-1, PANEL_VECTORS, VECTOR_ROWS))
        of_rows.append(panels.permute(1, 0, 4, 2, 3, 5).reshape(found.shape))
    return torch.cat(of_rows)


def whole(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix [N, K] without gaps as `blocks` of [PANEL_ROWS, BLOCK]: [N, K'] elements, and those that fill
    the last panel lie behind them."""
    padded = _padded(matrix, PANEL_ROWS, BLOCK)
    tiles = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, PANEL_ROWS)).transpose(1, 2)
    row_starts = torch.arange(len(tiles) + 1) * tiles.shape[1]
    packed = blocks(tiles.flatten(0, 1), row_starts, dtype)
    return in_huge_pages(packed.view(padded.shape))[: len(matrix)]


def taller_blocks(values: Tensor, row_starts: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of 16 rows as blocks of 32, with zeros where one of two block rows has none."""
    _, rows, width = values.shape
    count = row_starts.numel() - 1
    places = torch.repeat_interleave(torch.arange(count), row_starts.diff().long())
    keys, where = torch.unique((places // 2) * (columns.max() + 1) + columns, return_inverse=True)
    taller = values.new_zeros(keys.numel(), 2, rows, width)
    taller[where, places % 2] = values
    per_row = torch.bincount(keys // (columns.max() + 1), minlength=(count + 1) // 2)
    starts = torch.nn.functional.pad(per_row.cumsum(0), (1, 0))
    return taller.flatten(1, 2), starts, keys % (columns.max() + 1)


def nibble_table(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values [16] of nibbles, for pairs twice."""
    return values.float() if word_dtype(dtype) == torch.float32 else values.to(torch.bfloat16).repeat(2)


def code_table(values: Tensor) -> Tensor:
    """The values [128] of codes as bfloat16, which must hold them: first the low bytes, then the high
    ones."""
    return values.to(torch.bfloat16).view(torch.uint8).unflatten(0, (-1, 2)).T.contiguous()
