"""`linear` of every format on a CPU, against the product in double of what the weight stands for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastserve_kernels import formats, ops, reference
from fastserve_kernels.formats import Weight
from fastserve_kernels.formats.prepared import Prepared
from fastserve_kernels.preparation import prepare

pytestmark = pytest.mark.usefixtures("poison")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
ROWS = [0, 1, 2, 3, 16, 17, 64]


def widths(rows: int) -> Tensor:
    """Bits from 2 to 8."""
    return 2 + torch.arange(rows, dtype=torch.uint8) % 7


FORMATS: dict[str, Callable[[Tensor], Weight]] = {
    "dense": formats.Dense,
    "int4": formats.Int4.pack,
    "int4 g32 with zeros": lambda weight: formats.Int4.pack(weight, 32, symmetric=False),
    "int4 per row": lambda weight: formats.Int4.pack(weight, None),
    "int8": formats.Int8.pack,
    "int8 g64 with zeros": lambda weight: formats.Int8.pack(weight, 64, symmetric=False),
    "int rows": lambda weight: formats.IntRows.pack(weight, widths(len(weight)), 64, symmetric=False),
    "nf4": formats.NF4.pack,
    "nf4 of another codebook": lambda weight: formats.NF4.pack(weight, 128, torch.randn(16)),
    "fp8": formats.FP8.pack,
    "fp8 g128": lambda weight: formats.FP8.pack(weight, 128),
    "sparse24": formats.Sparse24.pack,
    "sparse24 int4": formats.Sparse24Int4.pack,
    "block sparse": lambda weight: formats.BlockSparse.pack(weight, (16, 32), 0.5),
    "bitmap": lambda weight: formats.Bitmap.pack(weight, density=0.5),
    "low rank": lambda weight: formats.LowRank(weight[:20], weight[:, :20] * 5),
}


def on_cpu(weight: Tensor) -> Prepared:
    return prepare(formats.Dense(weight), "cpu", weight.dtype)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    y = x.double() @ weight.double().T
    y = y if bias is None else y + bias.double()
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("extras", [False, True])
def test_equals_the_product_in_double(
    name: str, dtype: torch.dtype, extras: bool, rel_rms: Callable[[Tensor, Tensor], float]
) -> None:
    """Strided activations too."""
    weight = FORMATS[name]((torch.randn(80, 384) / 20).to(dtype))
    prepared = prepare(weight, "cpu", dtype)
    assert (prepared.out_features, prepared.in_features) == (80, 384)
    dequantized = weight.dequantize()
    for rows in ROWS:
        x = torch.randn(384, 2 * rows).to(dtype).T[::2]
        bias = torch.randn(80).to(dtype) if extras else None
        residual = torch.randn(rows, 160).to(dtype)[:, ::2] if extras else None
        before = torch.zeros(0) if residual is None else residual.clone()
        came = ops.linear(x, prepared, bias, residual)
        assert came.dtype == dtype
        assert rel_rms(came, exact(x, dequantized, bias, residual)) < TOLERANCE[dtype], rows
        assert residual is None or torch.equal(residual, before)  # it is not written to


@pytest.mark.parametrize("name", FORMATS)
def test_bias_and_residual_come_alone_too(name: str, rel_rms: Callable[[Tensor, Tensor], float]) -> None:
    weight = FORMATS[name](torch.randn(80, 384) / 20)
    prepared, x = prepare(weight, "cpu", torch.float32), torch.randn(3, 384)
    bias, residual = torch.randn(80), torch.randn(3, 80)
    wanted = exact(x, weight.dequantize(), None, None)
    assert rel_rms(ops.linear(x, prepared, bias), wanted + bias) < TOLERANCE[torch.float32]
    assert rel_rms(ops.linear(x, prepared, None, residual), wanted + residual) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("extras", [False, True])
def test_w8a8_rounds_activations_as_the_reference_does(
    dtype: torch.dtype, extras: bool, rel_rms: Callable[[Tensor, Tensor], float]
) -> None:
    weight = formats.W8A8.pack(torch.randn(80, 384) / 20)
    prepared = prepare(weight, "cpu", dtype)
    for rows in ROWS:
        x = torch.randn(rows, 384).to(dtype)
        x[1:2] = 0
        bias = torch.randn(80).to(dtype) if extras else None
        residual = torch.randn(rows, 80).to(dtype) if extras else None
        wanted = reference.linear_w8a8(x.double(), (weight.values, weight.scales, 80), bias, residual)
        assert rel_rms(ops.linear(x, prepared, bias, residual), wanted) < TOLERANCE[dtype], rows


WITH_QUANTIZED_ACTIVATIONS: dict[str, Callable[[Tensor], formats.Int4 | formats.Int8]] = {
    "int4 g32": lambda weight: formats.Int4.pack(weight, 32),
    "int4 g64 with zeros": lambda weight: formats.Int4.pack(weight, 64, symmetric=False),
    "int4 per row with zeros": lambda weight: formats.Int4.pack(weight, None, symmetric=False),
    "int8 g32 with zeros": lambda weight: formats.Int8.pack(weight, 32, symmetric=False),
    "int8 g128": lambda weight: formats.Int8.pack(weight, 128),
    "int8 per row": lambda weight: formats.Int8.pack(weight, None),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", WITH_QUANTIZED_ACTIVATIONS)
def test_activations_are_quantized_in_groups_as_the_reference_does(
    name: str, dtype: torch.dtype, rel_rms: Callable[[Tensor, Tensor], float]
) -> None:
    weight = WITH_QUANTIZED_ACTIVATIONS[name](torch.randn(83, 384) / 20)
    prepared = prepare(weight, "cpu", dtype, quantize_activations=True)
    if prepared.operator == "linear":
        pytest.skip("a processor without our kernels: nothing is rounded")
    oracle = getattr(reference, prepared.operator)
    for rows in ROWS:
        x = torch.randn(384, 2 * rows).to(dtype).T[::2]
        x[1:2] = 0
        x[:, 32:64] *= 1e-3
        x[2:3] = 1e-38
        bias, residual = torch.randn(83).to(dtype), torch.randn(rows, 83).to(dtype)
        for extras in ((None, None), (bias, residual)):
            assert oracle(x, weight.arguments, *extras).dtype == dtype
            wanted = oracle(x.float(), weight.arguments, *extras)
            assert rel_rms(ops.linear(x, prepared, *extras), wanted) < TOLERANCE[dtype], rows


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(960, 576), (576, 1536), (1, 1), (33, 7), (100, 72)]
)
@pytest.mark.parametrize("extras", [False, True])
def test_dense_weights_of_any_shape(
    out_features: int,
    in_features: int,
    extras: bool,
    dtype: torch.dtype,
    rel_rms: Callable[[Tensor, Tensor], float],
) -> None:
    weight = torch.randn(out_features, in_features).to(dtype)
    for rows in (0, 1, 2, 17):
        x = torch.randn(rows, in_features).to(dtype)
        bias = torch.randn(out_features).to(dtype) if extras else None
        residual = torch.randn(rows, out_features).to(dtype) if extras else None
        came = ops.linear(x, on_cpu(weight), bias, residual)
        assert rel_rms(came, exact(x, weight, bias, residual)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(960, 576), (576, 1536), (3072, 576), (2048, 4096)]
)
def test_a_row_does_not_depend_on_the_others(out_features: int, in_features: int, dtype: torch.dtype) -> None:
    weight = on_cpu(torch.randn(out_features, in_features).to(dtype))
    x = torch.randn(130, in_features).to(dtype)
    together = ops.linear(x, weight)
    for rows in (1, 2, 3, 5, 16, 31, 64):
        assert torch.equal(ops.linear(x[:rows].clone(), weight), together[:rows])
        assert torch.equal(ops.linear(x[-rows:].clone(), weight), together[-rows:])


@pytest.mark.parametrize("name", FORMATS)
def test_weights_may_be_of_another_dtype_than_activations(
    name: str, rel_rms: Callable[[Tensor, Tensor], float]
) -> None:
    weight = FORMATS[name](torch.randn(80, 384) / 20)
    x = torch.randn(5, 384).bfloat16()
    came = ops.linear(x, prepare(weight, "cpu", torch.bfloat16))
    assert came.dtype == torch.bfloat16
    assert rel_rms(came, exact(x, weight.dequantize(), None, None)) < TOLERANCE[torch.bfloat16]


def test_preparing_leaves_the_weight_as_it_was() -> None:
    for pack in FORMATS.values():
        weight = pack(torch.randn(64, 256))
        before = weight.dequantize()
        prepare(weight, "cpu", torch.bfloat16)
        assert torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize("shape", [(3, 63), (64,), (2, 3, 64)])
def test_activations_of_another_width_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must have shape \[T, 64\], not"):
        ops.linear(torch.randn(shape), on_cpu(torch.randn(8, 64)))
