"""Ragged paged batches with known contents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastserve_kernels.attention_metadata import AttentionMetadata, Batch
from fastserve_kernels.kv_cache import KVCache


@dataclass
class PagedBatch:
    """Sequences whose keys and values lie in shuffled blocks of a cache."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    meta: AttentionMetadata

    def cache(self, k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> KVCache:
        """The caches as operators take them."""
        return KVCache(self.k_cache, self.v_cache, k_scale, v_scale)

    @property
    def layout(self) -> Batch:
        """What an implementation of attention takes of the metadata."""
        return (self.meta.query_start, self.meta.context_lens, self.meta.block_tables)


MakeBatch = Callable[..., PagedBatch]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `Tensor.new_empty` gives is full of NaN, or of -99: an output must be wholly written."""
    empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(self, *args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -99)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.fixture
def make_batch() -> MakeBatch:
    def make(
        query_lens: list[int],
        context_lens: list[int],
        *,
        heads: tuple[int, int] = (9, 3),
        dims: tuple[int, int] = (64, 64),
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> PagedBatch:
        """heads: (queries', keys'); dims: (keys', values')."""
        counts = [-(-length // block_size) for length in context_lens]
        blocks = (torch.randperm(sum(counts)) + 1).tolist()
        tables = [blocks[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))]
        cache = (sum(counts) + 1, block_size, heads[1])
        return PagedBatch(
            q=torch.randn(sum(query_lens), heads[0], dims[0]).to(dtype),
            k_cache=torch.randn(*cache, dims[0]).to(dtype),
            v_cache=torch.randn(*cache, dims[1]).to(dtype),
            meta=AttentionMetadata.build(query_lens, context_lens, tables, block_size, "cpu"),
        )

    return make


@pytest.fixture
def rel_rms() -> Callable[[Tensor, Tensor], float]:
    """The root mean square of the difference, relative to that of the second."""

    def measure(came: Tensor, wanted: Tensor) -> float:
        assert came.shape == wanted.shape
        return float((came.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))

    return measure
