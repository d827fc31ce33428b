"""A weight format and its kernels, in one file: ternary weights, two bits each (BitNet, arXiv 2402.17764).

    python examples/custom_kernel.py

Weights are -1, 0 or 1 times a scale of their row. One implementation is in torch's operations, for any
device; the other is a Triton kernel, for GPUs. Once registered, the format goes where the built-in ones go:
`prepare`, `ops.linear`, and checkpoints of the project's own layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve_kernels import ops
from fastserve_kernels.formats.weight import FLOATS, MatrixWeight, check_even, check_tensor, check_weight
from fastserve_kernels.preparation import prepare
from fastserve_kernels.registration import register_format

CODES_PER_BYTE = 4
BLOCK_M, BLOCK_N, BLOCK_K = 16, 64, 64
"""Outputs [BLOCK_M, BLOCK_N] of a program, and columns it takes at a time."""


@dataclass(frozen=True, eq=False)
class Ternary(MatrixWeight):
    """w = (code - 1) * scale, with codes 0, 1 and 2."""

    codes: Tensor
    """[N, K / 4] uint8: column k is in byte k // 4, at bit 2 (k % 4)."""
    scales: Tensor
    """[N] float32."""

    operator: ClassVar[str] = "ternary::linear"
    columns_per_element: ClassVar[int] = CODES_PER_BYTE

    @classmethod
    def pack(cls, weight: Tensor) -> Ternary:
        """Rounds a float weight [N, K], K a multiple of 4; the scale is the mean magnitude of the row.

        Raises ValueError if the weight is not a finite float matrix of such a K.
        """
        weight = check_weight(weight).float()
        check_even(weight.shape[1], CODES_PER_BYTE)
        scales = weight.abs().mean(dim=1).clamp(min=1e-12)
        codes = ((weight / scales[:, None]).round().clamp(-1, 1) + 1).to(torch.uint8)
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=weight.device)
        packed = (codes.unflatten(1, (-1, CODES_PER_BYTE)) << shifts).sum(dim=2, dtype=torch.uint8)
        return cls(packed, scales)

    def _check(self) -> None:
        n, _ = check_tensor("Ternary.codes", self.codes, ("N", "K / 4"), (torch.uint8,))
        check_tensor("Ternary.scales", self.scales, (n,), FLOATS[:1])

    @property
    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """What `linear_ternary` takes between x and bias."""
        return (self.codes, self.scales)

    def dequantize(self) -> Tensor:
        """(code - 1) * scale: [N, K] float32."""
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=self.codes.device)
        codes = (self.codes[:, :, None] >> shifts & 3).flatten(1)
        return (codes.float() - 1) * self.scales[:, None]


@torch.library.custom_op("ternary::linear", mutates_args=())
def linear_ternary(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """x [T, K] times the weight transposed, plus bias [N] and residual [T, N]. Sums are float32."""
    y = x.float() @ Ternary(codes, scales).dequantize().T
    for term in (bias, residual):
        y = y if term is None else y + term.float()
    return y.to(x.dtype)


@linear_ternary.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


@linear_ternary.register_kernel("cuda")
def linear_ternary_gpu(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """`linear_ternary` by the Triton kernel; interpreted, it takes tensors of a CPU."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    m, n, k = x.shape[0], codes.shape[0], x.shape[1]
    y = x.new_empty(m, n)
    grid = (triton.cdiv(m, BLOCK_M), triton.cdiv(n, BLOCK_N))
    if m:
        _linear_kernel[grid](x, codes, scales, bias, residual, y, m, n, k, BLOCK_M, BLOCK_N, BLOCK_K)
    return y


@triton.jit
def _linear_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    m,
    n,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile [BLOCK_M, BLOCK_N] of y. Few tokens are bound by reading the codes, a quarter byte a weight."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + offs_m * k + offs_k, mask=(offs_m < m) & (offs_k < k), other=0.0)
        bytes_ptrs = codes_ptr + offs_n * (k // 4) + (offs_k // 4)[:, None]
        packed = tl.load(bytes_ptrs, mask=(offs_n < n) & (offs_k < k)[:, None], other=0)
        codes = (packed >> (2 * (offs_k % 4))[:, None].to(tl.uint8)) & 3
        acc += tl.dot(x, codes.to(x.dtype) - 1, input_precision="ieee")
    mask = (offs_m < m) & (offs_n < n)
    acc *= tl.load(scales_ptr + offs_n, mask=offs_n < n, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < n, other=0.0)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offs_m * n + offs_n, mask=mask, other=0.0)
    tl.store(y_ptr + offs_m * n + offs_n, acc.to(y_ptr.dtype.element_ty), mask=mask)


register_format(Ternary, linear_ternary)


def main() -> None:
    """Prints the size of a layer, and how far its outputs are from those before rounding."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024, device=device) * 0.02
    x = torch.randn(4, 1024, device=device)
    ternary = Ternary.pack(weight)
    y = ops.linear(x, prepare(ternary, device, x.dtype))
    exact = x @ weight.T
    error = ((y - exact).norm() / exact.norm()).item()
    print(f"{ternary.bits_per_weight:.2f} bits per weight, relative error {error:.2f} on {device}")


if __name__ == "__main__":
    main()
