"""The Triton kernels of 2:4 weights, interpreted where there is no GPU."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.kernels.gpu.conftest import TOLERANCE, CheckProduct
from torch import Tensor

from fastserve_kernels.formats.quantized import Int8
from fastserve_kernels.formats.sparse import Sparse24, Sparse24Int4
from fastserve_kernels.formats.weight import Weight
from fastserve_kernels.gpu import sparse24, sparse24_kernels
from fastserve_kernels.gpu.launch import launch_all

pytestmark = pytest.mark.usefixtures("poisoned")

RelRms = Callable[[Tensor, Tensor], float]
Product = Callable[..., Tensor]
Words = NDArray[np.uint32]

TOKENS = (1, 2, 3, 16, 17, 64)
FLOATS, INTEGERS = sparse24.OPERATORS


def floats(n: int, k: int, dtype: torch.dtype) -> Sparse24:
    return Sparse24.pack(torch.randn(n, k).to(dtype))


def integers(n: int, k: int, dtype: torch.dtype, group_size: int = 64) -> Sparse24Int4:
    return Sparse24Int4.pack(torch.randn(n, k).to(dtype), group_size)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("make", [floats, integers])
def test_equals_the_float32_product(
    make: Callable[..., Weight], tokens: int, dtype: torch.dtype, check_product: CheckProduct
) -> None:
    weight = make(37, 320, dtype)
    x, bias, residual = (torch.randn(size).to(dtype) for size in ((tokens, 320), (37,), (tokens, 37)))
    check_product(weight, x, bias, residual)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_scale_groups(group_size: int, dtype: torch.dtype, check_product: CheckProduct) -> None:
    columns = torch.arange(384) // group_size  # a wrong group's scale would show
    weight = Sparse24Int4.pack((torch.randn(16, 384) * 2.0**columns).to(dtype), group_size)
    x = (torch.randn(3, 384) * 2.0**-columns).to(dtype)
    check_product(weight, x)


@pytest.mark.parametrize("columns", [8, 24, 256, 264, 776])
def test_columns_that_fill_no_tile(columns: int, check_product: CheckProduct) -> None:
    weight, x = floats(19, columns, torch.float16), torch.randn(2, columns).half()
    check_product(weight, x)


def test_every_pattern_in_every_place(check_product: CheckProduct) -> None:
    pairs = torch.tensor(list(itertools.combinations(range(4), 2)))
    kept = pairs[torch.arange(6 * 64).view(6, 64).add(torch.arange(6)[:, None]) % 6]
    dense = torch.zeros(6, 64, 4).scatter_(2, kept, torch.randn(6, 64, 2)).flatten(1).half()
    weight, x = Sparse24.pack(dense), torch.randn(3, 256).half()
    assert torch.equal(weight.dequantize(), dense.float())
    check_product(weight, x)


@pytest.mark.parametrize("make", [floats, integers])
def test_x_that_is_not_contiguous_or_not_aligned(
    make: Callable[..., Weight], check_product: CheckProduct, device: torch.device
) -> None:
    weight = make(16, 256, torch.bfloat16)
    wide = torch.randn(3, 512).bfloat16()
    check_product(weight, wide[:, ::2])
    odd = torch.cat((torch.zeros(1), wide[:, ::2].flatten())).bfloat16().to(device)[1:].view(3, 256)
    check_product(weight, odd)


def test_no_tokens(product: Product) -> None:
    assert product(floats(16, 64, torch.float16), torch.empty(0, 64).half()).shape == (0, 16)


@pytest.mark.parametrize("operator", sparse24.OPERATORS, ids=lambda operator: operator.name)
@pytest.mark.parametrize("tokens", [1, 9, 20, 40, 70])
def test_every_candidate(
    tokens: int, operator: sparse24.Operator, device: torch.device, rel_rms: RelRms
) -> None:
    shape = {"m": tokens, "n": 24, "k": 520 if operator is FLOATS else 512}
    shape |= {} if operator is FLOATS else {"group_size": 32}
    *inputs, out = operator.inputs(shape, torch.float16, device)
    assert operator.reference is not None
    wanted = operator.reference(*inputs, out)
    tried = {tuple(config.constants.items()): config for config in operator.candidates(shape)}
    for config in tried.values():
        came = torch.full_like(out, torch.nan)
        launch_all(operator.plan(*inputs, came, config=config))
        assert rel_rms(came, wanted) < TOLERANCE[torch.float16], config


def test_candidates_are_few_and_split_small_layers() -> None:
    for tokens, columns in itertools.product((1, 16, 64, 2048), (512, 4096)):
        shape = {"m": tokens, "n": columns, "k": 4096}
        assert 1 <= len(FLOATS.candidates(shape)) <= 16
    assert max(config.constants["SPLITS"] for config in FLOATS.candidates({"m": 1, "n": 512, "k": 4096})) > 1
    large = {"m": 2048, "n": 8192, "k": 4096}
    assert {config.constants["SPLITS"] for config in INTEGERS.candidates(large)} == {1}


@pytest.mark.parametrize("make", [floats, integers])
def test_cost_counts_the_packed_bytes(make: Callable[..., Weight], device: torch.device) -> None:
    weight = make(32, 512, torch.float16)
    packed = sparse24.prepare(weight, device, torch.float16).arguments
    held = sum(tensor.nbytes for tensor in packed if isinstance(tensor, Tensor))
    operator = FLOATS if isinstance(weight, Sparse24) else INTEGERS
    shape = {"m": 3, "n": 32, "k": 512, "group_size": 64}
    assert operator.cost(shape, torch.float16).bytes == held + 2 * 3 * (32 + 512)
    assert held == weight.nbytes


def test_refuses_another_format(device: torch.device) -> None:
    with pytest.raises(ValueError, match="must be Sparse24 or Sparse24Int4, not Int8"):
        sparse24.prepare(Int8.pack(torch.randn(8, 32)), device, torch.float16)


def run_ptx(text: str, inputs: list[Words], outputs: int) -> list[Words]:
    """Runs the few instructions of PTX that the kernels' inline assembly is made of."""
    registers: dict[str, Words] = {f"${outputs + i}": words for i, words in enumerate(inputs)}

    def read(operand: str) -> Words:
        return registers[operand] if operand in registers else np.full_like(inputs[0], int(operand, 0))

    body = re.sub(r"\.reg .*?;", "", text.strip("{} "))
    for statement in filter(None, (part.strip() for part in body.split(";"))):
        name, rest = statement.split(" ", 1)
        into, *operands = (operand.strip() for operand in rest.split(","))
        registers[into] = instruction(name, [read(operand) for operand in operands])
    return [registers[f"${i}"] for i in range(outputs)]


def instruction(name: str, operands: list[Words]) -> Words:
    match name:
        case "mov.b32":
            return operands[0]
        case "and.b32":
            return operands[0] & operands[1]
        case "shl.b32":
            return operands[0] << operands[1]
        case "shr.u32":
            return operands[0] >> operands[1]
        case "mul.lo.u32":
            return operands[0] * operands[1]
        case "lop3.b32":
            a, b, c, table = operands
            terms = (
                (a if i & 4 else ~a)
                & (b if i & 2 else ~b)
                & (c if i & 1 else ~c)
                & -(table >> np.uint32(i) & 1)
                for i in range(8)
            )
            return np.bitwise_or.reduce(list(terms))
        case "prmt.b32":
            return permute(*operands)
        case "fma.rn.f16x2" | "add.rn.f16x2" | "fma.rn.bf16x2":
            x, y, *z = (halves(words, "bf16" in name) for words in operands)
            return words_of(x * y + z[0] if z else x + y, "bf16" in name)
    raise AssertionError(name)


def permute(a: Words, b: Words, selector: Words) -> Words:
    """Each nibble of the selector names one of eight bytes; with its high bit set, it spreads the sign."""
    source = np.concatenate((a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)), axis=1)
    chosen = selector[:, None] >> np.uint32(4) * np.arange(4, dtype=np.uint32) & 15
    found = np.take_along_axis(source, (chosen & 7).astype(np.int64), axis=1)
    found = np.where(chosen & 8, np.where(found & 128, 255, 0), found).astype(np.uint8)
    return np.ascontiguousarray(found).view(np.uint32)[:, 0]


def halves(words: Words, bfloat16: bool) -> NDArray[np.float64]:
    """[n] registers as [n, 2] numbers."""
    pairs = words.view(np.uint16).reshape(-1, 2)
    if bfloat16:
        return (pairs.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return pairs.view(np.float16).astype(np.float64)


def words_of(numbers: NDArray[np.float64], bfloat16: bool) -> Words:
    """[n, 2] numbers, which must be exact in the dtype, as [n] registers."""
    bits = numbers.astype(np.float32).view(np.uint32) >> np.uint32(16)
    pairs = bits.astype(np.uint16) if bfloat16 else numbers.astype(np.float16).view(np.uint16)
    words = np.ascontiguousarray(pairs).view(np.uint32)[:, 0]
    assert np.array_equal(halves(words, bfloat16), numbers)
    return words


def random_patterns(generator: np.random.Generator, count: int) -> Words:
    """Registers of two pattern words."""
    valid = np.array([1 << i | 1 << j for i, j in itertools.combinations(range(4), 2)], np.uint32)
    nibbles = generator.choice(valid, (count, 8))
    words: Words = np.bitwise_or.reduce(nibbles << np.uint32(4) * np.arange(8, dtype=np.uint32), axis=1)
    return words


def nibbles_of(words: Words) -> NDArray[np.uint32]:
    """[n] registers as [n, 2 words, 4 chunks]."""
    return (words[:, None] >> np.uint32(4) * np.arange(8, dtype=np.uint32) & np.uint32(15)).reshape(-1, 2, 4)


def spread(
    a: NDArray[np.float64], b: NDArray[np.float64], pattern: NDArray[np.uint32]
) -> NDArray[np.float64]:
    """Column by column, [..., 4]: the first kept column has a, the second b."""
    bits = pattern[..., None] >> np.arange(4, dtype=np.uint32) & 1
    return np.where(bits.cumsum(-1) == 1, a[..., None], b[..., None]) * bits


@pytest.mark.parametrize("chunk", range(4))
def test_assembly_that_spreads_floats(chunk: int) -> None:
    generator = np.random.default_rng(chunk)
    a, b = (generator.standard_normal((64, 2)).astype(np.float16).astype(np.float64) for _ in range(2))
    patterns = random_patterns(generator, 64)
    text = sparse24_kernels._SPREAD_FLOATS.value[chunk]
    came = run_ptx(text, [words_of(a, False), words_of(b, False), patterns], 4)
    wanted = spread(a, b, nibbles_of(patterns)[:, :, chunk])
    for column in range(4):
        assert np.array_equal(halves(came[column], False), wanted[..., column])


@pytest.mark.parametrize("bfloat16", [False, True])
def test_assembly_that_spreads_integers(bfloat16: bool) -> None:
    generator = np.random.default_rng(0)
    a, b = (generator.integers(0, 1 << 32, 256, dtype=np.uint32) for _ in range(2))
    patterns = random_patterns(generator, 256)
    text = sparse24_kernels._SPREAD_BFLOAT16 if bfloat16 else sparse24_kernels._SPREAD_FLOAT16
    came = run_ptx(text.value, [a, b, patterns], 16)
    numbers = [(nibbles_of(words) ^ 8).astype(np.float64) - 8 for words in (a, b)]
    wanted = spread(numbers[0], numbers[1], nibbles_of(patterns))
    for chunk, column in itertools.product(range(4), range(4)):
        assert np.array_equal(halves(came[4 * chunk + column], bfloat16), wanted[:, :, chunk, column])
