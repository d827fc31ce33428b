"""What the linears do alike on the host: calls, launches, splits, random inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastserve_kernels.formats.prepared import Prepared
from fastserve_kernels.formats.weight import Weight
from fastserve_kernels.gpu.launch import Config, Launch, launch_all
from fastserve_kernels.gpu.operator import Cost, Operator, Shape
from fastserve_kernels.gpu.split_k import arrivals, partial_sums
from fastserve_kernels.gpu.tuning import config_for

Arguments = tuple[Tensor | int | None, ...]
"""A weight's arguments, as `Prepared` has them."""
Added = tuple[Tensor | None, Tensor | None]
"""bias [N] and residual [M, N], which a product is added to; None for what there is not."""
LinearInputs = tuple[Tensor, Arguments, Added, Tensor]
"""x, the weight's arguments, bias and residual, out: what `plan` of a linear takes."""


def call_linear(operator: Operator, shape: Shape, x: Tensor, weight: Arguments, added: Added) -> Tensor:
    """x [M, K] times the weight transposed, plus what is added: [M, N] of x's dtype."""
    out = x.new_empty(shape["m"], shape["n"])
    if out.numel():
        config = config_for(operator, shape, x.device)
        bias, residual = (None if tensor is None else tensor.contiguous() for tensor in added)
        launch_all(operator.plan(x.contiguous(), weight, (bias, residual), out, config=config))
    return out


def rows_contiguous(
    x: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(x, bias, residual) with adjacent elements in each row; copied only where they are not."""
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    return x, bias, residual


def split_k_launch(
    kernel: object,
    pointers: Mapping[str, Tensor],
    added: Added,
    out: Tensor,
    k: int,
    constants: Mapping[str, Any],
    config: Config,
) -> Launch:
    """The launch of a kernel on the grid (tiles of M, tiles of N, SPLITS), whose splits share the columns K.

    out is [M, N] contiguous; the constants have BLOCK_M, BLOCK_N and SPLITS; `pointers` are x and the weight.
    """
    (m, n), (bias, residual), splits = out.shape, added, constants["SPLITS"]
    return Launch(
        kernel,
        (-(-m // constants["BLOCK_M"]), -(-n // constants["BLOCK_N"]), splits),
        {
            **pointers,
            "bias": bias,
            "residual": residual,
            "out": out,
            "partial": partial_sums(splits, m, n, out.device),
            "arrivals": arrivals(out.device) if splits > 1 else None,
            "M": m,
            "N": n,
            "K": k,
        },
        constants,
        config.num_warps,
        config.num_stages,
    )


def words_of_fours(x: Tensor) -> Tensor:
    """x [M, K] contiguous, K a multiple of 4, as [M, K / 4] int64; as it is if it is float32.

    Copies it if it does not begin at a multiple of 8 bytes, where words must.
    """
    if x.dtype == torch.float32:
        return x
    return (x.clone() if x.data_ptr() % 8 else x).view(torch.int64)


def random_linear(
    pack: Callable[[Tensor, Shape], Weight], prepare: Callable[[Weight, torch.device, torch.dtype], Prepared]
) -> Callable[[Shape, torch.dtype, torch.device], LinearInputs]:
    """The `inputs` of an operator whose shapes have m, n, k, for weights that `pack` makes of normal ones."""

    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> LinearInputs:
        m, n, k = shape["m"], shape["n"], shape["k"]
        weight = prepare(pack(torch.randn(n, k, dtype=dtype, device=device), shape), device, dtype)
        x = torch.randn(m, k, dtype=dtype, device=device)
        return (x, weight.arguments, (None, None), x.new_empty(m, n))

    return inputs


def linear_cost(shape: Shape, dtype: torch.dtype, weight_bytes: int, kept: int) -> Cost:
    """The cost of a linear that reads `weight_bytes` of weight, and multiplies by `kept` weights."""
    m, n, k = shape["m"], shape["n"], shape["k"]
    return Cost(bytes=weight_bytes + dtype.itemsize * m * (k + n), flops=2 * m * kept)


def splits_for(programs: int, steps: int, wanted: int = 528) -> int:
    """The power of two into which K is split so that about `wanted` programs run: 4 for each of an H200's 132
    multiprocessors. `programs` is their number without, `steps` the tiles of K.
    """
    splits = 1
    while 2 * splits <= steps and 2 * splits * programs <= wanted:
        splits *= 2
    return splits
