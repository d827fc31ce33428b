"""What is particular to the linears of a CPU: a row by itself, threads, packing, and other
processors."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastserve_kernels import formats, ops, reference
from fastserve_kernels.cpu import linear_preparation, linears
from fastserve_kernels.cpu.kernels import cpu_features
from fastserve_kernels.cpu.kernels.cpu_features import FLOAT_PRODUCTS, INTEGER_PRODUCTS
from fastserve_kernels.formats import Weight
from fastserve_kernels.preparation import prepare

pytestmark = pytest.mark.usefixtures("poison")
native = pytest.mark.skipif(
    not cpu_features.has(*FLOAT_PRODUCTS), reason="this processor lacks extensions of AVX-512"
)
with_integers = pytest.mark.skipif(
    not cpu_features.has(*INTEGER_PRODUCTS), reason="this processor lacks AVX2, FMA or F16C"
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def widths(rows: int) -> Tensor:
    """Bits from 2 to 8, the fewest for the last rows."""
    return (2 + torch.arange(rows).flip(0) % 7).byte()


FORMATS: dict[str, Callable[[Tensor], Weight]] = {
    "int4": lambda weight: formats.Int4.pack(weight, 32),
    "int4 with zeros": lambda weight: formats.Int4.pack(weight, None, symmetric=False),
    "nf4": lambda weight: formats.NF4.pack(weight, None),
    "int8": lambda weight: formats.Int8.pack(weight, 32),
    "int8 with zeros": lambda weight: formats.Int8.pack(weight, None, symmetric=False),
    "int rows": lambda weight: formats.IntRows.pack(weight, widths(len(weight)), 32),
    "int rows with zeros": lambda weight: formats.IntRows.pack(
        weight, widths(len(weight)), None, symmetric=False
    ),
    "fp8": lambda weight: formats.FP8.pack(weight, None),
    "w8a8": formats.W8A8.pack,
    "sparse24": formats.Sparse24.pack,
    "sparse24 int4": lambda weight: formats.Sparse24Int4.pack(weight, 32),
    "block sparse": lambda weight: formats.BlockSparse.pack(weight, (16, 32), 0.5),
    "tall blocks": lambda weight: formats.BlockSparse.pack(weight, (64, 16), 0.3),
    "bitmap": lambda weight: formats.Bitmap.pack(weight, density=0.4),
    "low rank": lambda weight: formats.LowRank.pack(weight, 37),
}


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_does_not_depend_on_the_others(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on the threads: rows alone, in groups of each size, beside a whole slice of the weight, in two
    blocks of tokens."""
    weight = prepare(FORMATS[name](torch.randn(192, 672).to(dtype)), "cpu", dtype)
    x = torch.randn(267, 672).to(dtype)
    together = ops.linear(x, weight)
    assert together.isfinite().all()
    for rows in (*range(1, 10), 16, 17, 31, 64, 66, 256, 258):
        assert torch.equal(ops.linear(x[:rows], weight), together[:rows]), rows
        assert torch.equal(ops.linear(x[-rows:], weight), together[-rows:]), rows
    monkeypatch.setattr(linears, "MIN_PARALLEL", 1)
    assert torch.equal(ops.linear(x, weight), together)
    monkeypatch.setattr(linears, "MIN_PARALLEL", 1 << 60)
    assert torch.equal(ops.linear(x, weight), together)


QUANTIZED_ACTIVATIONS = ("int4", "int4 with zeros", "int8", "int8 with zeros")


@with_integers
@pytest.mark.parametrize("name", QUANTIZED_ACTIVATIONS)
def test_a_row_of_quantized_activations_does_not_depend_on_the_others(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their scales are its own: it is the same beside any number of rows, and on any number of threads."""
    weight = FORMATS[name](torch.randn(192, 672).bfloat16())
    prepared = prepare(weight, "cpu", torch.bfloat16, quantize_activations=True)
    x = torch.randn(267, 672).bfloat16() * torch.logspace(-3, 3, 267)[:, None].bfloat16()
    together = ops.linear(x, prepared)
    assert together.isfinite().all()
    for rows in (*range(1, 10), 16, 17, 31, 33, 64, 66, 256, 258):
        assert torch.equal(ops.linear(x[:rows], prepared), together[:rows]), rows
        assert torch.equal(ops.linear(x[-rows:], prepared), together[-rows:]), rows
    for least in (1, 1 << 60):
        monkeypatch.setattr(linears, "MIN_PARALLEL", least)
        assert torch.equal(ops.linear(x, prepared), together)


@with_integers
@pytest.mark.parametrize("name", QUANTIZED_ACTIVATIONS)
def test_a_row_that_is_not_finite_spoils_no_other(name: str) -> None:
    weight = FORMATS[name](torch.randn(64, 672))
    prepared = prepare(weight, "cpu", torch.float32, quantize_activations=True)
    x = torch.randn(7, 672)
    wanted = ops.linear(x, prepared)
    x[2, 100], x[4, 3], x[5] = float("nan"), float("inf"), 1e-40
    came = ops.linear(x, prepared)
    assert not came[[2, 4]].isfinite().any()
    assert torch.equal(came[[0, 1, 3, 6]], wanted[[0, 1, 3, 6]])
    assert came[5].abs().max() < 1e-30


@pytest.fixture
def no_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_features, "compiled_features", frozenset)


def test_other_processors_quantize_no_activations(no_features: None) -> None:
    for weight in (formats.Int4.pack(torch.randn(64, 96), 32), formats.Int8.pack(torch.randn(64, 96), 32)):
        with pytest.warns(UserWarning, match="dequantized as they are loaded"):
            prepared = linear_preparation.PREPARE_A8[type(weight)](weight, torch.float32)
        assert prepared.operator == "linear"


@native
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 2), (33, 70), (47, 130), (100, 1030)])
def test_odd_shapes(
    shape: tuple[int, int], dtype: torch.dtype, rel_rms: Callable[[Tensor, Tensor], float]
) -> None:
    plain = torch.randn(shape)
    packs: list[Callable[[Tensor], Weight]] = [
        lambda weight: formats.Int4.pack(weight, None),
        lambda weight: formats.Int8.pack(weight, None),
        lambda weight: formats.Int8.pack(weight[:, :-1], None, symmetric=False),
        lambda weight: formats.IntRows.pack(weight, widths(len(weight)), None),
        lambda weight: formats.IntRows.pack(weight[:, :-1], widths(len(weight)), None, symmetric=False),
        lambda weight: formats.FP8.pack(weight[:, :-1], None),
        lambda weight: formats.LowRank.pack(weight[:, :-1], (min(weight.shape) + 1) // 2),
    ]
    for pack in packs:
        weight = pack(plain.to(dtype))
        roundings = 2 if isinstance(weight, formats.LowRank) else 1  # which few outputs do not even out
        for rows in (1, 3, 17):
            x = torch.randn(rows, weight.in_features).to(dtype)
            came = ops.linear(x, prepare(weight, "cpu", dtype))
            wanted = x.double() @ weight.dequantize().double().T
            assert rel_rms(came, wanted) < roundings * TOLERANCE[dtype]


@native
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scales_of_another_dtype(
    scale_dtype: torch.dtype, rel_rms: Callable[[Tensor, Tensor], float]
) -> None:
    x = torch.randn(5, 256)
    for weight in (
        formats.Int4.pack(torch.randn(64, 256), 64, False, scale_dtype),
        formats.Int8.pack(torch.randn(64, 256), 64, False, scale_dtype),
    ):
        wanted = x.double() @ weight.dequantize().double().T
        assert rel_rms(ops.linear(x, prepare(weight, "cpu", torch.float32)), wanted) < 1e-5


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_stands_for_its_value(dtype: torch.dtype) -> None:
    """Each of 256 columns has another code, and x picks one column at a time. -0 in x takes no harm."""
    x = torch.eye(256).to(dtype)
    integers = torch.arange(-128, 128, dtype=torch.int8).repeat(2, 1)
    ones = torch.ones(2, 1)
    came = ops.linear(x, prepare(formats.Int8(integers, ones, None, 256), "cpu", dtype))
    assert torch.equal(came, integers.T.to(dtype))
    zeros = torch.tensor([[-128.0], [3.25]])
    came = ops.linear(x, prepare(formats.Int8(integers, ones, zeros, 256), "cpu", dtype))
    assert torch.equal(came, (integers.T - zeros.T).to(dtype))
    bits = torch.arange(256, dtype=torch.uint8)
    floats = bits[(bits & 0x7F) != 0x7F].view(torch.float8_e4m3fn).repeat(2, 1)
    came = ops.linear(x[:254, :254], prepare(formats.FP8(floats, ones, 254), "cpu", dtype))
    assert torch.equal(came, floats.T.to(dtype))
    nibbles = (bits[:16] | bits[:16].flip(0) << 4).repeat(2, 1)
    came = ops.linear(x[:32, :32], prepare(formats.Int4(nibbles, ones, None, 32), "cpu", dtype))
    codes = torch.stack((bits[:16], bits[:16].flip(0)), 1).flatten().float() - 8
    assert torch.equal(came, codes[:, None].expand(-1, 2).to(dtype))


@with_integers
def test_w8a8_sums_are_exact() -> None:
    """Sums in float32 of so many columns would not be."""
    values = torch.randint(-127, 128, (40, 4100), dtype=torch.int8)
    weight = formats.W8A8(values, torch.rand(40) + 0.5)
    x = torch.randn(19, 4100)
    x[3] = 0
    x[4, 7], x[5, 9] = float("nan"), float("inf")
    came = ops.linear(x, prepare(weight, "cpu", torch.float32))
    good = [row for row in range(19) if row not in (4, 5)]
    wanted = reference.linear_w8a8(x[good], (values, weight.scales, 40), None, None)
    assert torch.allclose(came[good], wanted, rtol=3e-7, atol=0)
    assert came[4:6].isnan().all()


@native
def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 65536 columns, not 65600"):
        prepare(formats.W8A8(torch.ones(1, 65600, dtype=torch.int8), torch.ones(1)), "cpu", torch.float32)
    x = torch.randn(2, 64)
    for weight in (formats.NF4.pack(torch.randn(8, 64), 64), formats.LowRank.pack(torch.randn(8, 64), 4)):
        with pytest.raises(ValueError, match="prepared as"):
            ops.linear(x, prepare(weight, "cpu", torch.bfloat16))
    prepared = prepare(formats.Int4.pack(torch.randn(8, 64), 64), "cpu", torch.float32)
    with pytest.raises(ValueError, match="bias must be"):
        ops.linear(x, prepared, torch.zeros(8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="residual must be"):
        ops.linear(x, prepared, None, torch.zeros(2, 9))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_other_processors_get_dense_weights(
    dtype: torch.dtype, no_features: None, rel_rms: Callable[[Tensor, Tensor], float]
) -> None:
    for name in FORMATS.keys() - {"bitmap", "sparse24"}:  # which are dense on every processor
        weight = FORMATS[name](torch.randn(64, 96).to(dtype))
        prepare_it = linear_preparation.PREPARE[type(weight)]
        with pytest.warns(UserWarning, match="dequantized as they are loaded"):
            prepared = prepare_it(weight, dtype)
        assert prepared.operator == "linear"
        x = torch.randn(3, 96).to(dtype)
        wanted = x.double() @ weight.dequantize().double().T
        assert rel_rms(ops.linear(x, prepared), wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 3])
def test_dense_weights_of_a_processor_without_bfloat16(
    rows: int, monkeypatch: pytest.MonkeyPatch, rel_rms: Callable[[Tensor, Tensor], float]
) -> None:
    """Their products are those of float32, rounded before the residual is added."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    weight, x = torch.randn(40, 1100).bfloat16(), torch.randn(rows, 1100).bfloat16()
    bias, residual = torch.randn(40).bfloat16(), torch.randn(rows, 40).bfloat16()
    prepared = prepare(formats.Dense(weight), "cpu", torch.bfloat16)
    came = ops.linear(x, prepared, bias, residual)
    assert came.dtype == torch.bfloat16
    wanted = (x.double() @ weight.double().T + bias).bfloat16() + residual
    assert rel_rms(came, wanted.double()) < TOLERANCE[torch.bfloat16]


def test_the_warning_comes_once(no_features: None) -> None:
    weight = formats.Int4.pack(torch.randn(32, 64), 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            linear_preparation.prepare_int4(weight, torch.float32)
    assert len(caught) == 1
