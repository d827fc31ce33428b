"""GGUF blocks as weight formats, against the gguf library's own dequantization."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import ReaderTensor

from fastserve.checkpoints.gguf_blocks import read_blocks
from fastserve_kernels.formats import Int4, Int8

ROWS, COLUMNS = 6, 512
BLOCK_BYTES = {Type.Q4_0: 18, Type.Q4_1: 20, Type.Q4_K: 144, Type.Q8_0: 34}


def stored(tensor_type: Type, data: np.ndarray) -> ReaderTensor:
    """A matrix as the reader of a file gives it."""
    shape = np.array([COLUMNS, ROWS], dtype=np.uint32)
    return ReaderTensor("w", tensor_type, shape, ROWS * COLUMNS, data.nbytes, 0, data, None)  # type: ignore[arg-type]


def random_blocks(tensor_type: Type) -> np.ndarray:
    """Codes of all values, scales such as weights have; a superblock begins with d and its minimum."""
    generator = np.random.default_rng(0)
    if tensor_type != Type.Q4_K:
        return gguf.quantize(generator.normal(size=(ROWS, COLUMNS)).astype(np.float32), tensor_type)
    blocks = generator.integers(0, 256, (ROWS, COLUMNS // 256, BLOCK_BYTES[tensor_type]), dtype=np.uint8)
    headers = generator.uniform(1e-4, 1e-2, (ROWS, COLUMNS // 256, 2)).astype(np.float16)
    blocks[..., :4] = headers.view(np.uint8)
    return blocks.reshape(ROWS, -1)


@pytest.mark.parametrize("tensor_type", BLOCK_BYTES)
@pytest.mark.parametrize("exact", [False, True])
def test_equals_the_librarys_values(tensor_type: Type, exact: bool) -> None:
    data = random_blocks(tensor_type)
    wanted = torch.from_numpy(gguf.dequantize(data, tensor_type).reshape(ROWS, COLUMNS))
    weight = read_blocks(stored(tensor_type, data), exact)
    assert isinstance(weight, Int8 if tensor_type == Type.Q8_0 else Int4)
    assert weight.scales.dtype == torch.float32 if exact else torch.float16
    came = weight.dequantize()
    tolerance = 1e-6 if exact else 1e-3
    assert float((came - wanted).norm() / wanted.norm()) <= tolerance


def test_a_group_of_one_value_keeps_it() -> None:
    values = np.full((ROWS, COLUMNS), 0.75, dtype=np.float32)
    values[1] = 0
    data = gguf.quantize(values, Type.Q4_1)
    weight = read_blocks(stored(Type.Q4_1, data), exact=False)
    assert weight is not None
    assert torch.equal(weight.dequantize(), torch.from_numpy(values))


def test_a_zero_point_far_from_the_codes_is_kept_in_float32() -> None:
    values = 100 + np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    data = gguf.quantize(values, Type.Q4_1)
    weight = read_blocks(stored(Type.Q4_1, data), exact=False)
    assert weight is not None
    assert weight.scales.dtype == torch.float32
    wanted = torch.from_numpy(gguf.dequantize(data, Type.Q4_1))
    assert float((weight.dequantize() - wanted).abs().max()) <= 1e-4


def test_other_blocks_are_not_read() -> None:
    data = gguf.quantize(np.ones((ROWS, COLUMNS), dtype=np.float32), Type.Q5_0)
    assert read_blocks(stored(Type.Q5_0, data), exact=False) is None
