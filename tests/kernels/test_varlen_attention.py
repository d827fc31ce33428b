"""Attention over ragged batches against `reference`, and against what it is in plain words."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastserve_kernels import ops, reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
HEADS, DIM = 3, 16


def ragged(lengths: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v, which are columns of one tensor as a fused product leaves them, and cu_seqlens."""
    torch.manual_seed(0)
    q, k, v = torch.randn(sum(lengths), 3, HEADS, DIM).to(dtype).unbind(1)
    return q, k, v, torch.tensor([0, *accumulate(lengths)])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("window", "farthest"), [(None, None), (0, None), (5, None), (300, 1), (None, 1), (None, 40), (5, 40)]
)
def test_is_near_the_reference(dtype: torch.dtype, window: int | None, farthest: int | None) -> None:
    q, k, v, cu_seqlens = ragged([1, 2, 530, 7, 257, 256], dtype)
    bias = None if farthest is None else torch.randn(HEADS, 2 * farthest + 1).to(dtype)
    came = ops.varlen_attention(q, k, v, cu_seqlens, 0.25, window, bias)
    wanted = reference.varlen_attention(q, k, v, cu_seqlens, 0.25, window, bias)
    torch.testing.assert_close(came, wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@settings(max_examples=20)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([None, 0, 3]))
def test_a_sequence_does_not_see_the_others(lengths: list[int], window: int | None) -> None:
    q, k, v, cu_seqlens = ragged(lengths)
    together = ops.varlen_attention(q, k, v, cu_seqlens, 0.25, window)
    for number, length in enumerate(lengths):
        rows = slice(int(cu_seqlens[number]), int(cu_seqlens[number + 1]))
        alone = ops.varlen_attention(q[rows], k[rows], v[rows], torch.tensor([0, length]), 0.25, window)
        torch.testing.assert_close(together[rows], alone, atol=1e-6, rtol=1e-6)


def test_the_reference_is_softmax_of_scores_and_biases_within_the_window() -> None:
    q, k, v, cu_seqlens = ragged([5])
    bias = torch.tensor([[-1.0, 0.5, 2.0]]).expand(HEADS, -1)
    came = reference.varlen_attention(q, k, v, cu_seqlens, 0.5, 2, bias)
    for head in range(HEADS):
        for i in range(5):
            seen = [j for j in range(5) if abs(j - i) <= 2]
            added = [float(bias[head, 1 + max(-1, min(1, j - i))]) for j in seen]
            scores = torch.tensor(
                [float(q[i, head] @ k[j, head]) * 0.5 + b for j, b in zip(seen, added, strict=True)]
            )
            expected = scores.softmax(0) @ v[seen, head]
            torch.testing.assert_close(came[i, head], expected, atol=1e-5, rtol=1e-5)


def test_no_sequences_have_no_result() -> None:
    q, k, v, cu_seqlens = ragged([])
    assert ops.varlen_attention(q, k, v, cu_seqlens, 1.0).shape == (0, HEADS, DIM)
