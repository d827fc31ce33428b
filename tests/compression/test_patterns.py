"""Patterns: what they leave out, and the formats they are read back from."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastserve.compression.sparsity_patterns import (
    ROWS,
    UNSTRUCTURED,
    BlockPattern,
    Pattern,
    PatternName,
    Scope,
    TwoOfFour,
    mask_of,
    parse_pattern,
    repack,
)
from fastserve_kernels.formats import (
    Bitmap,
    BlockSparse,
    Dense,
    Int4,
    LowRank,
    Sparse24,
    Sparse24Int4,
    Weight,
)

BLOCKS = BlockPattern(16, 32)
PATTERNS = (UNSTRUCTURED, ROWS, TwoOfFour(), BLOCKS)
FORMATS: dict[Pattern, type[Weight]] = {
    UNSTRUCTURED: Bitmap,
    ROWS: Bitmap,
    TwoOfFour(): Sparse24,
    BLOCKS: BlockSparse,
}

patterns = st.sampled_from(PATTERNS)
seeds = st.integers(0, 2**31)
sparsities = st.floats(0.01, 0.99)


def random(seed: int, rows: int = 48, columns: int = 64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(seeds)
def test_two_of_each_four_are_kept_and_they_cost_most(seed: int) -> None:
    costs = random(seed).abs()
    fours, kept = costs.unflatten(1, (-1, 4)), TwoOfFour().mask(costs).unflatten(1, (-1, 4))
    assert (kept.sum(-1) == 2).all()
    assert (fours.where(kept, torch.inf).amin(-1) >= fours.where(~kept, 0).amax(-1)).all()


@given(seeds, sparsities, st.sampled_from(("row", "matrix")))
def test_single_weights_are_left_out_by_exact_count(seed: int, sparsity: float, scope: Scope) -> None:
    costs = random(seed).abs()
    kept = UNSTRUCTURED.mask(costs, sparsity, scope)
    if scope == "row":
        assert (kept.sum(1) == 64 - round(sparsity * 64)).all()
    else:
        assert kept.sum() == 48 * 64 - round(sparsity * 48 * 64)
        assert costs.where(kept, torch.inf).min() >= costs.where(~kept, 0).max()


@given(seeds, sparsities)
def test_blocks_are_kept_whole_and_by_exact_count(seed: int, sparsity: float) -> None:
    for pattern, count in ((BLOCKS, 6), (ROWS, 48)):
        costs = random(seed).abs()
        means = pattern.block_means(pattern.mask(costs, sparsity).float())
        assert ((means == 0) | (means == 1)).all()
        assert means.numel() == count
        assert means.sum() == count - round(sparsity * count)


def test_the_block_of_the_least_sum_goes() -> None:
    costs = torch.ones(32, 64)
    costs[16:, 32:] = 0.9
    costs[0, 0] = 0
    kept = BLOCKS.mask(costs, 0.25)
    assert not kept[16:, 32:].any()
    assert kept.sum() == 3 * 16 * 32


@given(seeds, patterns)
def test_a_mask_is_read_back_as_it_was_packed(seed: int, pattern: Pattern) -> None:
    weight = random(seed).bfloat16()
    weight[:, :3] = 0  # What is kept may be 0.
    mask = pattern.mask(random(seed + 1).abs(), 0.5)
    packed = pattern.pack(weight, mask)
    assert type(packed) is FORMATS[pattern]
    found = mask_of(packed)
    assert found is not None
    assert torch.equal(found, mask)
    assert torch.equal(packed.dequantize(), weight.float() * mask)


@given(seeds, patterns)
def test_new_values_come_in_the_same_places_and_dtype(seed: int, pattern: Pattern) -> None:
    weight, other = random(seed).bfloat16(), random(seed + 2)
    mask = pattern.mask(weight.float().abs(), 0.5)
    repacked = repack(pattern.pack(weight, mask), other)
    assert type(repacked) is FORMATS[pattern]
    assert torch.equal(repacked.dequantize(), other.bfloat16().float() * mask)


def test_two_of_four_in_four_bits_has_a_mask_too() -> None:
    weight = random(0)
    found = mask_of(Sparse24Int4.pack(weight, 32))
    assert found is not None
    assert torch.equal(found, TwoOfFour().mask(weight.abs()))


def test_dense_weights_codes_and_factors_leave_nothing_out() -> None:
    weight = random(0)
    for packed in (Dense(weight), Int4.pack(weight, 32), LowRank.pack(weight, 4)):
        assert mask_of(packed) is None


def test_a_dense_weight_takes_new_values_and_codes_do_not() -> None:
    weight = random(0)
    assert torch.equal(repack(Dense(weight.bfloat16()), weight).dequantize(), weight.bfloat16().float())
    with pytest.raises(TypeError, match="Int4 takes no new values"):
        repack(Int4.pack(weight, 32), weight)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("unstructured", UNSTRUCTURED),
        ("rows", ROWS),
        ("2:4", TwoOfFour()),
        ("block 32x64", BlockPattern(32, 64)),
        ("block 128x16", BlockPattern(128, 16)),
    ],
)
def test_a_pattern_is_spelt_one_way(name: str, pattern: Pattern) -> None:
    assert parse_pattern(msgspec.convert(name, PatternName)) == pattern


@pytest.mark.parametrize("name", ["1:4", "block", "block 8x8", "block 32", "Unstructured", "block 32x64 "])
def test_other_patterns_are_refused(name: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="unstructured"):
        msgspec.convert(name, PatternName)


def test_shapes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 16x32 do not divide 48x80"):
        BLOCKS.check((48, 80))
    with pytest.raises(ValueError, match="4x12 are no multiple of 8"):
        TwoOfFour().check((4, 12))
    for pattern in (UNSTRUCTURED, ROWS):
        pattern.check((3, 5))
