"""The blocks of a GGUF tensor as weight formats: the codes stay as they are, none is rounded again.

Four kinds of block hold whole numbers on a line, which is what `Int4` and `Int8` are, in groups of 32:
Q4_0 (w = d (q - 8)), Q4_1 (w = d q + m), Q4_K (w = d q + m; d and m are products of a number of 6 bits and
one of the superblock of 256) and Q8_0 (w = d q). The layouts are those of ggml-quants in llama.cpp.
"""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGMLQuantizationType, ReaderTensor
from numpy.typing import NDArray
from torch import Tensor

from fastserve_kernels.formats import Int4, Int8
from fastserve_kernels.formats.weight import pack_pairs

GROUP = 32
_CHUNK_ELEMENTS = 1 << 20
"""Read at a time: it takes several times the memory of what is left of it."""
_WIDEST_HALF_ZERO = 32.0
"""float16 holds zero points up to this size to within 1/128 of a step."""

Blocks = NDArray[np.uint8]
Numbers = NDArray[np.float32]


def read_blocks(tensor: ReaderTensor, exact: bool) -> Int4 | Int8 | None:
    """A matrix in the format that its blocks are; None for blocks of another kind than the four.

    Scales and zero points are float16, or float32 where float16 would not do: if they are to be `exact`, and
    where a zero point lies far from the codes.
    """
    reader = _READERS.get(tensor.tensor_type)
    if reader is None:
        return None
    rows, width = int(tensor.shape[1]), int(tensor.shape[0])
    data, step = tensor.data.reshape(rows, -1), max(1, _CHUNK_ELEMENTS // width)
    parts: tuple[list[Tensor], list[Numbers], list[Numbers]] = ([], [], [])
    for first in range(0, rows, step):
        read, part_scales, part_zeros = reader(data[first : first + step])
        parts[0].append(_stored(read))
        parts[1].append(part_scales)
        parts[2].append(part_zeros)
    codes, scales, zeros = torch.cat(parts[0]), np.concatenate(parts[1]), np.concatenate(parts[2])
    near = float(np.abs(zeros).max(initial=0)) <= _WIDEST_HALF_ZERO
    dtype = torch.float16 if near and not exact and _fit_halves(scales) else torch.float32
    if codes.dtype == torch.int8:
        return Int8(codes, _tensor(scales).to(dtype), None, GROUP)
    symmetric = tensor.tensor_type == GGMLQuantizationType.Q4_0
    return Int4(
        codes,
        _tensor(scales).to(dtype),
        None if symmetric else _tensor(zeros).to(dtype),
        GROUP,
    )


def _fit_halves(numbers: Numbers) -> bool:
    """Whether float16 rounds them no more than it rounds any: none is too small for it, or too large."""
    return bool(np.allclose(numbers.astype(np.float16), numbers, rtol=2**-11, atol=0))


def _stored(codes: NDArray) -> Tensor:
    """Codes as the formats hold them: of 8 bits, or two of 4 bits in a byte."""
    tensor = _tensor(codes)
    return tensor if codes.dtype == np.int8 else pack_pairs(tensor)


def _tensor(array: NDArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _halves(blocks: Blocks, start: int) -> Numbers:
    """The float16 that stands at byte `start` of each block."""
    return blocks[..., start : start + 2].copy().view(np.float16)[..., 0].astype(np.float32)


def _nibbles(blocks: Blocks) -> Blocks:
    """All low nibbles of a run of bytes, then all high ones: the codes in order."""
    return np.concatenate((blocks & 15, blocks >> 4), axis=-1)


def _zero_points(codes: Blocks, scales: Numbers, minimums: Numbers) -> tuple[Blocks, Numbers, Numbers]:
    """d q + m as d (q - z). A group of one value has d = 0: it becomes code 0, m (0 + 1)."""
    flat = (scales == 0) & (minimums != 0)
    safe = np.where(scales == 0, 1, scales)
    zeros = np.where(flat, -1, -minimums / safe).astype(np.float32)
    codes = np.where(np.repeat(flat, GROUP, axis=-1), 0, codes).astype(np.uint8)
    return codes, np.where(flat, minimums, scales), zeros


def _q4_0(data: Blocks) -> tuple[Blocks, Numbers, Numbers]:
    blocks = data.reshape(len(data), -1, 18)
    scales = _halves(blocks, 0)
    return _nibbles(blocks[..., 2:]).reshape(len(data), -1), scales, np.full_like(scales, 8)


def _q4_1(data: Blocks) -> tuple[Blocks, Numbers, Numbers]:
    blocks = data.reshape(len(data), -1, 20)
    codes = _nibbles(blocks[..., 4:]).reshape(len(data), -1)
    return _zero_points(codes, _halves(blocks, 0), _halves(blocks, 2))


def _q4_k(data: Blocks) -> tuple[Blocks, Numbers, Numbers]:
    blocks = data.reshape(len(data), -1, 144)
    low, middle, high = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    # Eight numbers of 6 bits each: the first four in the low bits, the last four in two pieces.
    scales = np.concatenate((low & 63, high & 15 | (low >> 6) << 4), axis=-1)
    minimums = np.concatenate((middle & 63, high >> 4 | (middle >> 6) << 4), axis=-1)
    codes = _nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)).reshape(len(data), -1)
    return _zero_points(
        codes,
        (_halves(blocks, 0)[..., None] * scales).reshape(len(data), -1),
        (-_halves(blocks, 2)[..., None] * minimums).reshape(len(data), -1),
    )


def _q8_0(data: Blocks) -> tuple[NDArray, Numbers, Numbers]:
    blocks = data.reshape(len(data), -1, 34)
    scales = _halves(blocks, 0)
    return blocks[..., 2:].copy().view(np.int8).reshape(len(data), -1), scales, np.zeros_like(scales)


_READERS = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q8_0: _q8_0,
}
