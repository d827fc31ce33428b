"""Weights in huge pages."""

from __future__ import annotations

import gc
import mmap
import weakref
from typing import Any

import pytest
import torch

from fastserve_kernels.cpu.kernels.huge_pages import CACHE_LINE, CHUNK_BYTES, in_huge_pages


def test_a_copy_has_the_values_the_shape_and_the_dtype_and_begins_a_line() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.int64):
        for shape in ((3, 5), (7,), (0, 4), (1, 2, 3)):
            tensor = torch.randint(0, 100, shape).to(dtype)
            copy = in_huge_pages(tensor)
            assert copy.dtype == dtype
            assert torch.equal(copy, tensor)
            assert copy.data_ptr() % CACHE_LINE == 0


def test_copies_do_not_overlap() -> None:
    copies = [in_huge_pages(torch.full((100,), value, dtype=torch.uint8)) for value in range(50)]
    for value, copy in enumerate(copies):
        assert (copy == value).all()


def test_a_tensor_larger_than_a_chunk_has_one_of_its_own() -> None:
    tensor = torch.arange(CHUNK_BYTES // 8 + 1, dtype=torch.int64)
    assert torch.equal(in_huge_pages(tensor), tensor)


def test_memory_goes_back_with_the_last_tensor_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[mmap.mmap]] = []

    def noted(*arguments: Any, **options: Any) -> mmap.mmap:
        memory = real(*arguments, **options)
        made.append(weakref.ref(memory))
        return memory

    real = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", noted)
    large = in_huge_pages(torch.zeros(CHUNK_BYTES + 1, dtype=torch.uint8))
    in_huge_pages(
        torch.zeros(CHUNK_BYTES, dtype=torch.uint8)
    )  # no part of the first one's memory is free now
    assert [memory() is None for memory in made] == [False, False]
    del large
    gc.collect()
    assert made[0]() is None
