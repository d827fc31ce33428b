"""A GGUF file as a checkpoint: tensors by transformers' names, dequantized or as formats of ours."""

from __future__ import annotations

import torch
from gguf import ReaderTensor
from torch import Tensor

from fastserve.checkpoints.gguf_architectures import ARCHITECTURES
from fastserve.checkpoints.gguf_blocks import read_blocks
from fastserve.checkpoints.gguf_file import GgufFile, tensor_shape
from fastserve.checkpoints.gguf_rope import ROPE_FREQS
from fastserve.checkpoints.gguf_tensor import deinterleave, dequantize_into, rows_of
from fastserve.checkpoints.gguf_tensor_names import transformers_name
from fastserve.checkpoints.weight_rows import select_rows
from fastserve_kernels.formats import Int4, Int8

MAPPED_BYTES = 16 << 20
"""Bytes that are read of the file before its pages are given back."""


class GgufCheckpoint:
    """A `Checkpoint` in a GGUF file."""

    dtype = torch.bfloat16
    """Blocks have no dtype of their own: the activations have this one."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._tensors = {
            transformers_name(name): tensor for name, tensor in file.tensors.items() if name != ROPE_FREQS
        }
        self._bytes_read = 0
        self.shapes = {name: tensor_shape(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str, destination: Tensor, rows: range | None = None) -> None:
        """See `Checkpoint`."""
        tensor, heads = self._tensor(name, rows), self._interleaved_heads(name, rows)
        if heads is None:
            dequantize_into(tensor, destination)
            return
        interleaved = torch.empty_like(destination)
        dequantize_into(tensor, interleaved)
        destination.copy_(deinterleave(interleaved, heads))

    def read_packed(self, name: str, exact: bool, rows: range | None = None) -> Int4 | Int8 | None:
        """A matrix [N, K] as its blocks hold it; None for blocks of a kind that must be dequantized."""
        heads = self._interleaved_heads(name, rows)
        weight = read_blocks(self._tensor(name, rows), exact)
        if weight is None or heads is None:
            return weight
        return select_rows(weight, torch.arange(weight.out_features).view(heads, -1, 2).mT.flatten())

    def _tensor(self, name: str, rows: range | None) -> ReaderTensor:
        tensor = self._tensors[name]
        tensor = tensor if rows is None else rows_of(tensor, rows)
        if self._bytes_read > MAPPED_BYTES:
            self._file.release_pages()
            self._bytes_read = 0
        self._bytes_read += tensor.n_bytes
        return tensor

    def _interleaved_heads(self, name: str, rows: range | None) -> int | None:
        """The number of heads that the rows belong to, if the two halves of each head alternate; else None.

        llama.cpp's Llama rotates neighbours where transformers rotates halves.
        """
        if not ARCHITECTURES[self._file.architecture].interleaved:
            return None
        heads = count = self._file.required_value("attention.head_count")
        if ".k_proj." in name:
            count = self._file.architecture_value("attention.head_count_kv", heads)
        elif ".q_proj." not in name:
            return None
        return count if rows is None else count * len(rows) // self.shapes[name][0]
