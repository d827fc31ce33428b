"""The PTX of `pair_assembly`, which Triton's interpreter does not run: here step by step, for every word."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from torch import Tensor

from fastserve_kernels.gpu import pair_assembly
from fastserve_kernels.gpu.int4_linear import pack_codebook

DTYPES = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16}
WORDS = torch.arange(1 << 16)


def pairs_of(low: Tensor, high: Tensor) -> Tensor:
    """Registers [n] int64 of two 16-bit words."""
    return high << 16 | low


def numbers(registers: Tensor, dtype: tl.dtype) -> tuple[Tensor, Tensor]:
    """The low and the high number of each register."""
    halves = (registers & 0xFFFF, registers >> 16)
    low, high = (half.to(torch.int32).to(torch.uint16).view(DTYPES[dtype]) for half in halves)
    return low, high


def registers_of(low: Tensor, high: Tensor) -> Tensor:
    return pairs_of(*(half.view(torch.int16).long() & 0xFFFF for half in (low, high)))


def fma(dtype: tl.dtype, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """In float64, where the products and sums of these tests are exact, rounded once."""
    factors = zip(numbers(a, dtype), numbers(b, dtype), numbers(c, dtype), strict=True)
    return registers_of(*((x.double() * y.double() + z.double()).to(DTYPES[dtype]) for x, y, z in factors))


def permuted(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    eight, result = b << 32 | a, torch.zeros_like(a | selector)
    for i in range(4):
        place = selector >> 4 * i & 15
        assert not (place & 8).any(), "a byte of signs"
        result |= (eight >> 8 * place & 0xFF) << 8 * i
    return result


def run(text: str, *arguments: Tensor, results: int = 1) -> list[Tensor]:
    """What is in the registers from $0 on; the arguments are those that follow them."""
    known = {f"${results + i}": argument for i, argument in enumerate(arguments)}

    def value(name: str) -> Tensor:
        return (
            torch.tensor(int(name, 16 if name.startswith("0x") else 10)) if name[0].isdigit() else known[name]
        )

    for line in text.strip("{} ").split(";"):
        name, _, operands = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *sources = (operand.strip() for operand in operands.split(","))
        a, *others = (value(source) for source in sources)
        if name == "mov.b32":
            result = a
        elif name == "shr.b32":
            result = a >> others[0]
        elif name == "shl.b32":
            result = a << others[0] & 0xFFFFFFFF
        elif name == "and.b32":
            result = a & others[0]
        elif name == "lop3.b32":
            assert others[2] == 0xEA
            result = a & others[0] | others[1]
        elif name == "prmt.b32":
            result = permuted(a, *others)
        else:
            assert name in ("fma.rn.bf16x2", "fma.rn.f16x2")
            result = fma(tl.bfloat16 if "bf16" in name else tl.float16, a, *others)
        known[target] = result
    return [known[f"${i}"] for i in range(results)]


@pytest.fixture
def registers() -> Tensor:
    """Every word in the low half, another of them in the high one."""
    return pairs_of(WORDS, WORDS.flip(0) ^ 0x5A5A)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shift", "mask"), [(0, 15), (4, 15), (8, 15), (12, 15), (0, 127), (8, 128)])
def test_digits(registers: Tensor, dtype: tl.dtype, shift: int, mask: int) -> None:
    (result,) = run(pair_assembly.digits(dtype, shift, mask), registers)
    power = pair_assembly.power_of_mantissa(dtype)
    for came, word in zip(numbers(result, dtype), (registers & 0xFFFF, registers >> 16), strict=True):
        assert torch.equal(came.double(), power + (word >> shift & mask).double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_difference_and_product(dtype: tl.dtype) -> None:
    a, b = ([torch.randn(99).to(DTYPES[dtype]) for _ in range(2)] for _ in range(2))
    for text, wanted in (
        (pair_assembly.difference(dtype), [x - y for x, y in zip(a, b, strict=True)]),
        (pair_assembly.product(dtype), [x * y for x, y in zip(a, b, strict=True)]),
    ):
        (result,) = run(text, registers_of(*a), registers_of(*b))
        assert all(map(torch.equal, numbers(result, dtype), wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [0, 1])
def test_float8(registers: Tensor, dtype: tl.dtype, index: int) -> None:
    (result,) = run(pair_assembly.float8(dtype, index), registers)
    for came, word in zip(numbers(result, dtype), (registers & 0xFFFF, registers >> 16), strict=True):
        byte = (word >> 8 * index & 0xFF).to(torch.uint8)
        wanted = byte.view(torch.float8_e4m3fn).to(DTYPES[dtype])
        number = (byte & 127) != 127
        assert torch.equal(came[number], wanted[number])


@pytest.mark.parametrize("dtype", DTYPES)
def test_codebook(registers: Tensor, dtype: tl.dtype) -> None:
    entries = torch.randn(16)
    planes = pack_codebook(entries, DTYPES[dtype])[16:].view(torch.int32).long() & 0xFFFFFFFF
    twice = [plane for plane in planes for _ in range(2)]
    results = run(pair_assembly.codebook(), registers, *twice, results=4)
    for i, result in enumerate(results):
        for came, word in zip(numbers(result, dtype), (registers & 0xFFFF, registers >> 16), strict=True):
            assert torch.equal(came, entries.to(DTYPES[dtype])[word >> 4 * i & 15])
