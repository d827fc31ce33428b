"""Weights of a decoder that are read from the checkpoint anew whenever they are used.

Memory then holds one layer at a time, for passes over many tokens that would not fit beside the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from torch import Tensor

from fastserve import heap
from fastserve.models.decoder import DecoderLayer, EmbeddingTable


class LazyEmbedding:
    """The embedding [vocab, hidden] of a decoder, read anew by `read` for each lookup."""

    def __init__(self, read: Callable[[], EmbeddingTable]) -> None:
        self._read = read

    def __getitem__(self, rows: Tensor) -> Tensor:
        heap.trim()
        return self._read()[rows]


class LazyLayers(Sequence[DecoderLayer]):
    """The `count` layers of a decoder, each read anew by `read`, by its index, whenever it is taken."""

    def __init__(self, read: Callable[[int], DecoderLayer], count: int) -> None:
        self._read = read
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> DecoderLayer: ...
    @overload
    def __getitem__(self, index: slice) -> list[DecoderLayer]: ...
    def __getitem__(self, index: int | slice) -> DecoderLayer | list[DecoderLayer]:
        if isinstance(index, slice):
            return [self._read(i) for i in range(*index.indices(self._count))]
        heap.trim()
        return self._read(range(self._count)[index])
