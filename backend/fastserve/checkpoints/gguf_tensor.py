"""The values of a GGUF file's tensors: dequantized, and in transformers' order of rows."""

from __future__ import annotations

import torch
from gguf import ReaderTensor, dequantize
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20
"""Dequantized at a time, so that the float32 values stay in the processor's cache."""


def dequantize_into(tensor: ReaderTensor, destination: Tensor) -> None:
    """Writes the values of a tensor into `destination` of its shape and of any float dtype, some rows at a
    time."""
    data = tensor.data.reshape(destination.shape[0], -1)
    rows = max(1, _CHUNK_ELEMENTS * destination.shape[0] // destination.numel())
    for start in range(0, destination.shape[0], rows):
        target = destination[start : start + rows]
        values = dequantize(data[start : start + rows], tensor.tensor_type)
        target.copy_(torch.from_numpy(values).view(target.shape))


def rows_of(tensor: ReaderTensor, rows: range) -> ReaderTensor:
    """Adjacent rows of a tensor as a tensor; nothing is read."""
    data = tensor.data.reshape(tensor.shape[-1], -1)[rows.start : rows.stop]
    shape = tensor.shape.copy()
    shape[-1] = len(rows)
    size = int(shape.prod())
    return tensor._replace(data=data, shape=shape, n_elements=size, n_bytes=data.nbytes)


def deinterleave(rows: Tensor, heads: int) -> Tensor:
    """The rows [heads * head_dim, ...] of queries or keys with one half of each head after the other, as
    transformers rotates them. In a file of llama.cpp's Llama the halves alternate: it rotates neighbours."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
