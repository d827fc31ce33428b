"""A weight format and its kernels in one file, with no change to any other file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastserve_kernels import ops
from fastserve_kernels.formats import Dense
from fastserve_kernels.formats.weight_io import weight_from_tensors, weight_tensors
from fastserve_kernels.preparation import prepare
from fastserve_kernels.registration import register_format


@pytest.fixture(scope="module")
def custom_kernel(examples: Path) -> Any:
    """Imported here: the folder of the examples is not on the path before."""
    import custom_kernel

    return custom_kernel


def operands(tokens: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, residual."""
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, k), (n, k), (n,), (tokens, n)
    x, weight, bias, residual = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight, bias, residual


def test_the_format_holds_what_it_rounds_to(custom_kernel: Any) -> None:
    weight = torch.tensor([[3.0, -3.0, 0.0, 1.0, -2.0, 0.5, 2.5, -4.0]])
    ternary = custom_kernel.Ternary.pack(weight)
    scale = weight.abs().mean()
    assert torch.equal(ternary.dequantize(), scale * torch.tensor([[1.0, -1, 0, 0, -1, 0, 1, -1]]))
    assert (ternary.out_features, ternary.in_features) == (1, 8)
    with pytest.raises(ValueError, match="multiple of 4"):
        custom_kernel.Ternary.pack(torch.randn(3, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_takes_it(dtype: torch.dtype, custom_kernel: Any) -> None:
    x, weight, bias, residual = operands(5, 12, 64, dtype)
    ternary = custom_kernel.Ternary.pack(weight)
    wanted = (x.float() @ ternary.dequantize().T + bias.float() + residual.float()).to(dtype)
    assert torch.equal(ops.linear(x, prepare(ternary, "cpu", dtype), bias, residual), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 1, 4), (3, 70, 100), (17, 64, 128), (0, 8, 8)])
@pytest.mark.parametrize("plus", [True, False])
def test_its_triton_kernel(
    tokens: int, n: int, k: int, plus: bool, dtype: torch.dtype, custom_kernel: Any
) -> None:
    device = "cpu" if custom_kernel.triton.knobs.runtime.interpret else "cuda"
    x, weight, bias, residual = (each.to(device) for each in operands(tokens, n, k, dtype))
    arguments = custom_kernel.Ternary.pack(weight).arguments
    added = (bias, residual) if plus else (None, None)
    came = custom_kernel.linear_ternary_gpu(x, *arguments, *added)
    wanted = custom_kernel.linear_ternary(x, *arguments, *added)
    torch.testing.assert_close(came, wanted, rtol=1e-3 if dtype is torch.float16 else 1e-5, atol=1e-4)


def test_torch_takes_it_for_an_operator(custom_kernel: Any) -> None:
    x, weight, bias, residual = operands(5, 12, 64, torch.float32)
    given = (x, *custom_kernel.Ternary.pack(weight).arguments, bias, residual)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.ternary.linear.default, given, test_utils=checks)


def test_a_checkpoint_holds_it(custom_kernel: Any) -> None:
    ternary = custom_kernel.Ternary.pack(torch.randn(8, 16))
    tensors, entry = weight_tensors(ternary)
    assert entry == {"format": "Ternary"}
    again = weight_from_tensors(entry, tensors)
    assert isinstance(again, custom_kernel.Ternary)
    assert torch.equal(again.dequantize(), ternary.dequantize())


def test_a_name_is_not_given_twice(custom_kernel: Any) -> None:
    with pytest.raises(ValueError, match="there is a format Dense already"):
        register_format(type("Dense", (Dense,), {}), custom_kernel.linear_ternary)
    with pytest.raises(ValueError, match="there is an operator linear already"):
        register_format(type("Denser", (Dense,), {}), custom_kernel.linear_ternary)


def test_it_runs_as_a_program() -> None:
    program = [sys.executable, str(Path(__file__).parents[2] / "examples" / "custom_kernel.py")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "2.03 bits per weight, relative error 0.51 on cpu\n"
