"""The plain formats: what rounding costs, how the tensors lie, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastserve_kernels.formats import (
    FP8,
    NF4,
    NORMAL_FLOAT_4,
    W8A8,
    Bitmap,
    BlockSparse,
    Dense,
    Int4,
    Int8,
    IntRows,
    LowRank,
    Sparse24,
    Sparse24Int4,
    Weight,
)

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
EVERY_FORMAT: dict[str, Callable[[Tensor], Weight]] = {
    "Dense": Dense,
    "Int4": Int4.pack,
    "Int8": Int8.pack,
    "IntRows": lambda weight: IntRows.pack(weight, torch.full((len(weight),), 5, dtype=torch.uint8)),
    "NF4": NF4.pack,
    "FP8": FP8.pack,
    "W8A8": W8A8.pack,
    "Sparse24": Sparse24.pack,
    "Sparse24Int4": Sparse24Int4.pack,
    "BlockSparse": BlockSparse.pack,
    "Bitmap": Bitmap.pack,
    "LowRank": lambda weight: LowRank.pack(weight, 5),
}


@st.composite
def weights(draw: st.DrawFn, even: bool) -> tuple[Tensor, int | None]:
    """A weight of any float dtype and magnitude, some of its groups zero or of one sign, and a group size."""
    group_size = draw(st.sampled_from([None, 32, 64, 128]))
    columns = draw(st.integers(1, 40)) * (2 if even else 1) if group_size is None else None
    rows, groups = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    shape = (rows, columns or groups * (group_size or 1))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(shape) * 10.0 ** draw(st.integers(-6, 3))
    change = draw(st.sampled_from(["none", "positive", "negative", "shifted", "zeros"]))
    if change in ("positive", "negative"):
        weight = weight.abs() * (1 if change == "positive" else -1)
    elif change == "shifted":
        weight += 3 * weight.abs().max()
    elif change == "zeros":
        weight[0] = 0
    return weight.to(draw(st.sampled_from(FLOATS))), group_size


@settings(deadline=None, max_examples=150)
@given(drawn=weights(even=True), kind=st.sampled_from([Int4, Int8]), symmetric=st.booleans())
def test_integers_are_within_half_a_step(
    drawn: tuple[Tensor, int | None], kind: type[Int4] | type[Int8], symmetric: bool
) -> None:
    weight, group_size = drawn
    packed = kind.pack(weight, group_size, symmetric)
    assert packed.group_size == (group_size or weight.shape[1])
    assert packed.scales.dtype == weight.dtype
    assert (packed.zeros is None) == symmetric
    step = packed.scales.float().repeat_interleave(packed.group_size, 1)
    # A scale that was rounded leaves the outermost codes short of the largest weights by that much.
    largest_code = 15 if kind is Int4 else 255
    slack = 0.5 + largest_code * torch.finfo(weight.dtype).eps + 1e-3
    error = (packed.dequantize() - weight.float()).abs()
    assert (error <= slack * step).all()
    assert (packed.dequantize()[weight == 0] == 0).all()


@settings(deadline=None, max_examples=75)
@given(drawn=weights(even=False), symmetric=st.booleans(), data=st.data())
def test_rows_have_the_bits_that_they_are_given(
    drawn: tuple[Tensor, int | None], symmetric: bool, data: st.DataObject
) -> None:
    """Those of 8 are the rows of `Int8`, others half a step off at most; no gap is between their codes."""
    weight, group_size = drawn
    width = st.integers(2, 8)
    bits = torch.tensor(data.draw(st.lists(width, min_size=len(weight), max_size=len(weight)))).byte()
    packed = IntRows.pack(weight, bits, group_size, symmetric)
    came = packed.dequantize()
    assert torch.equal(came[bits == 8], Int8.pack(weight, group_size, symmetric).dequantize()[bits == 8])
    steps = packed.scales.float().repeat_interleave(packed.group_size, 1)
    largest_codes = 2.0 ** bits[:, None] - 1
    slack = 0.5 + largest_codes * torch.finfo(weight.dtype).eps + 1e-3
    assert ((came - weight.float()).abs() <= slack * steps).all()
    codes = weight.shape[1] + (0 if symmetric else packed.scales.shape[1])
    rows_of_widths = [int((bits == some).sum()) for some in range(2, 9)]
    assert len(packed.words) == sum(
        -(-rows * codes * some // 32) for some, rows in enumerate(rows_of_widths, 2)
    )


def test_rows_of_too_few_or_too_many_bits_are_refused() -> None:
    for wrong in (1, 9):
        bits = torch.tensor([4, wrong], dtype=torch.uint8)
        with pytest.raises(ValueError, match=f"bits must be from 2 to 8, not .*{wrong}"):
            IntRows.pack(torch.randn(2, 64), bits)
    packed = IntRows.pack(torch.randn(2, 64), torch.tensor([4, 5], dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"IntRows.words must be int32 of shape \[18\]"):
        IntRows(packed.words[1:], packed.bits, packed.scales, 64, True)


@settings(deadline=None, max_examples=75)
@given(drawn=weights(even=True), ordered=st.booleans())
def test_a_codebook_gives_the_nearest_entry(drawn: tuple[Tensor, int | None], ordered: bool) -> None:
    weight, group_size = drawn
    codebook = torch.tensor(NORMAL_FLOAT_4) if ordered else torch.randn(16).sort(descending=True).values
    packed = NF4.pack(weight, group_size, codebook)
    scales = packed.scales.float().repeat_interleave(packed.group_size, 1)
    candidates = codebook * scales[..., None]
    least = (candidates - weight.float()[..., None]).abs().amin(-1)
    error = (packed.dequantize() - weight.float()).abs()
    assert (error <= least + 1e-6 * scales * codebook.abs().max()).all()


@settings(deadline=None, max_examples=75)
@given(drawn=weights(even=False))
def test_eight_bit_floats_are_within_their_precision(drawn: tuple[Tensor, int | None]) -> None:
    weight, group_size = drawn
    packed = FP8.pack(weight, group_size)
    scales = packed.scales.float().repeat_interleave(packed.group_size, 1)
    assert packed.values.float().abs().max() <= 448
    # Three bits after the first; below 2^-6 steps of 2^-9. A rounded scale cuts off the largest.
    allowed = weight.float().abs() * (2**-4 + torch.finfo(weight.dtype).eps) + scales * 2**-10
    assert ((packed.dequantize() - weight.float()).abs() <= allowed * 1.001).all()


@settings(deadline=None, max_examples=40)
@given(drawn=weights(even=False))
def test_w8a8_is_int8_with_one_scale_per_row(drawn: tuple[Tensor, int | None]) -> None:
    weight, _ = drawn
    assert torch.equal(W8A8.pack(weight).dequantize(), Int8.pack(weight.float()).dequantize())


def test_the_normal_float_codebook_is_made_of_quantiles() -> None:
    """The codebook of the paper: 8 positive and 7 negative quantiles of equal probability and 0, scaled to
    1."""
    normal = torch.distributions.Normal(0, 1)
    offset = 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    wanted = torch.cat((positive, torch.zeros(1), negative)).sort().values
    torch.testing.assert_close(torch.tensor(NORMAL_FLOAT_4), wanted / wanted.max(), atol=1e-5, rtol=0)


def test_literal_codes_lie_with_the_even_column_low() -> None:
    codes = torch.tensor([[0x21, 0xF3]], dtype=torch.uint8)
    half = torch.tensor([[0.5]])
    assert Int4(codes, half, None, 4).dequantize().tolist() == [[-3.5, -3.0, -2.5, 3.5]]
    assert Int4(codes, half, torch.tensor([[1.5]]), 4).dequantize().tolist() == [[-0.25, 0.25, 0.75, 6.75]]
    codebook = torch.arange(16.0) * 10
    assert NF4(codes, half, codebook, 4).dequantize().tolist() == [[5.0, 10.0, 15.0, 75.0]]


def test_literal_scales() -> None:
    """The largest weight is the largest code, or half a step from it where codes are symmetric."""
    weight = torch.tensor([[-3.0, 0.0, 1.0, 1.5]])
    assert Int4.pack(weight, None).scales.item() == pytest.approx(3 / 7.5)
    assert Int4.pack(weight, None, symmetric=False).scales.item() == pytest.approx(4.5 / 15)
    assert Int8.pack(weight).scales.item() == pytest.approx(3 / 127.5)
    assert Int8.pack(weight, symmetric=False).scales.item() == pytest.approx(4.5 / 255)
    assert W8A8.pack(weight).scales.item() == pytest.approx(3 / 127.5)
    assert NF4.pack(weight, None).scales.item() == 3
    assert FP8.pack(weight).scales.item() == pytest.approx(3 / 448)


def test_literal_groups_are_adjacent_columns() -> None:
    values = torch.ones(1, 64, dtype=torch.int8)
    scales, zeros = torch.tensor([[2.0, 3.0]]), torch.tensor([[0.5, -1.0]])
    assert Int8(values, scales, zeros, 32).dequantize().tolist() == [[1.0] * 32 + [6.0] * 32]


def test_literal_two_of_four() -> None:
    weight = torch.tensor([[0.0, 5, -1, 3, 7, 7, 7, 7]])
    packed = Sparse24.pack(weight)
    assert packed.values.tolist() == [[5, 3, 7, 7]]  # of equal ones the first
    assert packed.indices.tolist() == [[0b0100_1101]]
    assert packed.dequantize().tolist() == [[0, 5, 0, 3, 7, 7, 0, 0]]
    quarter = torch.tensor([[0.25]])
    codes, indices = torch.full((1, 8), 0x9F, dtype=torch.uint8), torch.full((1, 4), 0x4D, dtype=torch.uint8)
    four_bits = Sparse24Int4(codes, indices, quarter, 32)
    assert four_bits.dequantize().tolist() == [[0, 1.75, 0, 0.25, 1.75, 0.25, 0, 0] * 4]


def test_literal_bitmap() -> None:
    weight = torch.zeros(2, 10)
    weight[0, 0], weight[0, 9], weight[1, 3] = 1, 2, 3
    packed = Bitmap.pack(weight)
    assert packed.values.tolist() == [1, 2, 3]
    assert packed.mask.tolist() == [[0b1, 0b10], [0b1000, 0]]
    assert packed.row_starts.tolist() == [0, 2, 3]


@pytest.mark.parametrize("dtype", FLOATS)
def test_two_of_four_keeps_the_largest(dtype: torch.dtype) -> None:
    weight = torch.randn(9, 48).to(dtype)
    kept = Sparse24.pack(weight).dequantize()
    assert ((kept == 0) | (kept == weight)).all()
    fours = weight.float().unflatten(1, (-1, 4))
    wanted = fours.abs().topk(2).values.sum(-1)
    assert torch.equal(kept.unflatten(1, (-1, 4)).abs().sum(-1), wanted)
    assert torch.equal(Sparse24.pack(kept.to(dtype)).dequantize(), kept)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_two_of_four_in_four_bits_is_within_half_a_step(group_size: int) -> None:
    weight = torch.randn(5, 256)
    packed = Sparse24Int4.pack(weight, group_size)
    kept = Sparse24.pack(weight)
    assert torch.equal(packed.indices, kept.indices)
    step = packed.scales.repeat_interleave(group_size, 1)
    assert ((packed.dequantize() - kept.dequantize()).abs() <= 0.5001 * step).all()
    assert packed.dequantize().count_nonzero() > 0


@settings(deadline=None, max_examples=40)
@given(
    block=st.tuples(st.sampled_from([16, 32, 64]), st.sampled_from([16, 32, 64, 128])),
    counts=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    density=st.sampled_from([None, 0.2, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_blocks_of_the_largest_norm_are_kept(
    block: tuple[int, int], counts: tuple[int, int], density: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(counts[0] * block[0], counts[1] * block[1])
    if density is None:
        weight[: block[0]] = 0
    packed = BlockSparse.pack(weight, block, density)
    came, whole = (
        w.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1])) for w in (packed.dequantize(), weight)
    )
    kept = came.abs().sum((1, 3)) > 0
    assert torch.equal(came, whole * kept[:, None, :, None])
    norms = whole.abs().sum((1, 3))
    if density is None:
        assert torch.equal(kept, norms > 0)
    else:
        assert kept.sum() == round(density * kept.numel())
    if kept.any() and not kept.all():
        assert norms[kept].min() >= norms[~kept].max()
    for row in range(counts[0]):
        columns = packed.columns[packed.row_starts[row] : packed.row_starts[row + 1]]
        assert columns.tolist() == kept[row].nonzero().flatten().tolist()


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 40),
    density=st.sampled_from([None, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_a_bitmap_keeps_single_weights(rows: int, columns: int, density: float | None, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns)
    if density is None:
        weight[torch.rand(rows, columns) < 0.5] = 0
    packed = Bitmap.pack(weight, density=density)
    kept = packed.dequantize()
    assert ((kept == 0) | (kept == weight)).all()
    if density is None:
        assert torch.equal(kept, weight)
    else:
        assert packed.values.numel() == round(density * weight.numel())
        assert kept.abs().sum() == pytest.approx(
            weight.abs().flatten().topk(packed.values.numel()).values.sum().item(), rel=1e-5
        )


def test_a_bitmap_keeps_what_its_mask_says() -> None:
    weight, mask = torch.randn(4, 13), torch.rand(4, 13) < 0.3
    weight[mask.nonzero()[0, 0], mask.nonzero()[0, 1]] = 0  # kept all the same
    packed = Bitmap.pack(weight, mask)
    assert packed.values.numel() == mask.sum()
    assert torch.equal(packed.dequantize(), weight * mask)


def test_low_rank_is_the_nearest_of_its_rank() -> None:
    weight = torch.randn(12, 20)
    singular = torch.linalg.svdvals(weight)
    for rank in (1, 5, 12):
        packed = LowRank.pack(weight, rank)
        assert (packed.up.shape, packed.down.shape) == ((12, rank), (rank, 20))
        error = (packed.dequantize() - weight).norm()
        torch.testing.assert_close(error, singular[rank:].square().sum().sqrt(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("packed", "bits"),
    [
        (Dense(torch.zeros(128, 128).bfloat16()), 16),
        (Int4.pack(torch.zeros(128, 128).bfloat16()), 4.125),
        (Int4.pack(torch.zeros(128, 128), 32, False, torch.float16), 5),
        (Int8.pack(torch.zeros(128, 128).half()), 8.125),
        (NF4.pack(torch.zeros(128, 128).half()), 4.25 + 16 * 32 / 128**2),
        (FP8.pack(torch.zeros(128, 128)), 8.25),
        (W8A8.pack(torch.zeros(128, 128).half()), 8.25),
        (Sparse24.pack(torch.zeros(128, 128).half()), 9),
        (Sparse24Int4.pack(torch.zeros(128, 128).half()), 3.125),
        (BlockSparse.pack(torch.ones(128, 128).half(), density=0.5), 8 + 8 * (3 * 4 + 2 * 4) / 128**2),
        (Bitmap.pack(torch.ones(128, 128).half(), density=0.5), 9 + 8 * 129 * 4 / 128**2),
        (LowRank.pack(torch.randn(128, 128), 4), 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Weight) else "",
)
def test_bits_per_weight(packed: Weight, bits: float) -> None:
    assert packed.bits_per_weight == pytest.approx(bits)
    assert packed.nbytes == pytest.approx(bits * 128 * 128 / 8)


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_what_all_formats_share(name: str) -> None:
    weight = torch.randn(64, 128)
    packed = EVERY_FORMAT[name](weight.bfloat16())
    assert (packed.out_features, packed.in_features) == (64, 128)
    assert packed.dequantize().shape == (64, 128)
    assert packed.dequantize().dtype == torch.float32
    moved = packed.to("cpu")
    assert type(moved) is type(packed)
    assert torch.equal(moved.dequantize(), packed.dequantize())


def test_to_moves_all_tensors() -> None:
    packed = Int4.pack(torch.randn(64, 128), 32, symmetric=False)
    moved = packed.to("meta")
    assert moved.zeros is not None
    assert [t.device.type for t in (moved.codes, moved.scales, moved.zeros)] == ["meta"] * 3
    assert (moved.group_size, moved.nbytes) == (32, packed.nbytes)


REFUSED_WEIGHTS: list[tuple[Tensor, str]] = [
    (
        torch.randn(4, 64, 1),
        r"weight must be float32 or float16 or bfloat16 of shape \[N, K\], not .*\[4, 64, 1\]",
    ),
    (torch.randn(4, 0), r"not float32 of shape \[4, 0\]"),
    (torch.ones(4, 64).int(), "not int32"),
    (torch.full((64, 64), torch.nan), "weight must be finite"),
    (torch.full((64, 64), torch.inf), "weight must be finite"),
]


@pytest.mark.parametrize("name", [name for name in EVERY_FORMAT if name != "Dense"])
@pytest.mark.parametrize(("weight", "message"), REFUSED_WEIGHTS)
def test_no_format_packs_what_is_no_finite_matrix(name: str, weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EVERY_FORMAT[name](weight)


W = torch.linspace(-1, 1, 8 * 96).view(8, 96)
BYTES = torch.zeros(8, 48, dtype=torch.uint8)
HALF = torch.ones(8, 3).half()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dense(torch.zeros(8)), r"Dense.weight must be .* of shape \[N, K\]"),
        (
            lambda: Int4.pack(W, 64),
            "group_size must be one of 32, 64, 128 that divides the 96 columns, .* not 64",
        ),
        (lambda: Int4.pack(W, 48), "not 48"),
        (lambda: Int4.pack(W[:, :31], None), "columns of the weight must be a multiple of 2, not 31"),
        (lambda: Int8.pack(W, 0), "not 0"),
        (lambda: Int8.pack(W, -1), "not -1"),
        (lambda: Int4.pack(W, 32, scale_dtype=torch.int8), "scale_dtype must be float32, .* not int8"),
        (lambda: Int4.pack(W * 1e9, 32, scale_dtype=torch.float16), "float16 cannot hold a scale of 1.33e"),
        (lambda: Int4(BYTES.char(), HALF, None, 32), r"Int4.codes must be uint8 .*, not int8"),
        (
            lambda: Int4(BYTES, HALF[:, :2], None, 32),
            r"Int4.scales must be .* of shape \[8, 3\], not .*\[8, 2\]",
        ),
        (lambda: Int4(BYTES, HALF.double(), None, 32), "Int4.scales must be .* not float64"),
        (lambda: Int4(BYTES, HALF, HALF.float(), 32), "Int4.zeros must be float16"),
        (lambda: Int4(BYTES, HALF, None, 16), "not 16"),
        (lambda: Int4(BYTES, HALF.to("meta"), None, 32), "one device, not codes on cpu, scales on meta"),
        (lambda: Int8(W, HALF, None, 32), "Int8.values must be int8"),
        (lambda: NF4.pack(W, 32, torch.zeros(15)), r"codebook must be float32 of shape \[16\], not .*\[15\]"),
        (lambda: NF4(BYTES, HALF, torch.zeros(16).half(), 32), "NF4.codebook must be float32"),
        (lambda: FP8(W, HALF, 32), "FP8.values must be float8_e4m3fn"),
        (lambda: W8A8(W.char(), HALF[:, 0]), "W8A8.scales must be float32"),
        (lambda: Sparse24.pack(W[:, :12]), "multiple of 8, not 12"),
        (lambda: Sparse24(W, BYTES), r"Sparse24.indices must be uint8 of shape \[8, 24\]"),
        (lambda: Sparse24(W, BYTES[:, :24]), "Sparse24.indices must hold two different columns"),
        (lambda: Sparse24Int4.pack(W, 96), "not 96"),
        (lambda: BlockSparse.pack(W), "64 rows|rows, which divide the weight's 8"),
        (lambda: BlockSparse.pack(torch.ones(24, 96), (24, 32)), "not 24"),
        (lambda: BlockSparse.pack(torch.ones(32, 96), (32, 32), 0.0), "density must be above 0 .* not 0.0"),
        (lambda: Bitmap.pack(W, density=1.5), "not 1.5"),
        (lambda: Bitmap.pack(W, W > 0, 0.5), "mask or a density, not both"),
        (lambda: Bitmap.pack(W, W), "mask must be bool"),
        (lambda: LowRank.pack(W, 9), "rank must be from 1 to 8, not 9"),
        (lambda: LowRank.pack(W, 0), "not 0"),
        (lambda: LowRank(W, W), r"LowRank.up must be float32 of shape \[N, 8\]"),
    ],
)
def test_refusals_name_the_field(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("starts", "columns", "message"),
    [
        ([0, 1], [0, 1], "row_starts must be int32"),
        ([1, 1, 2], [0, 1], "row_starts must ascend from 0 to 2"),
        ([0, 3, 2], [0, 1], "row_starts must ascend from 0 to 2"),
        ([0, 1, 2], [0, 3], "columns must be from 0 to 2, not from 0 to 3"),
        ([0, 1, 2], [-1, 2], "columns must be from 0 to 2, not from -1 to 2"),
        ([0, 2, 2], [2, 1], "columns must ascend within each block row"),
        ([0, 2, 2], [1, 1], "columns must ascend within each block row"),
    ],
)
def test_blocks_that_lie_nowhere_are_refused(starts: list[int], columns: list[int], message: str) -> None:
    blocks = torch.ones(2, 16, 32)
    with pytest.raises(ValueError, match=message):
        BlockSparse(blocks, torch.tensor(starts).int(), torch.tensor(columns).int(), (32, 96))


def test_a_mask_that_disagrees_with_its_rows_is_refused() -> None:
    packed = Bitmap.pack(torch.ones(2, 10))
    for mask in (packed.mask & 254, packed.mask << 1):
        with pytest.raises(ValueError, match=r"Bitmap.mask must have as many bits"):
            Bitmap(packed.values, mask, packed.row_starts, 10)
