"""The values of a GGUF file's tensors."""

from __future__ import annotations

import torch
from gguf import ReaderTensor, dequantize
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20
"""Dequantized at a time, so that the float32 values stay in the processor's cache."""


def dequantize_into(tensor: ReaderTensor, destination: Tensor) -> None:
    """Writes the values of a tensor into `destination` of its shape, some rows at a time."""
    data = tensor.data.reshape(destination.shape[0], -1)
    rows = max(1, _CHUNK_ELEMENTS * destination.shape[0] // destination.numel())
    for start in range(0, destination.shape[0], rows):
        target = destination[start : start + rows]
        values = dequantize(data[start : start + rows], tensor.tensor_type)
        target.copy_(torch.from_numpy(values).view(target.shape))


def deinterleave(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * head_dim, ...] where the two halves of each head alternate, as llama.cpp's Llama has them
    because it rotates neighbours, with one half after the other, as transformers rotates them."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
