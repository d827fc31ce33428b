"""Products with weights of few bits: what their formats share of preparing, planning, tuning and running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve_kernels.formats.weight import Weight
from fastserve_kernels.gpu.fragments import arrange_groups, block_columns, blocks_of, half_width
from fastserve_kernels.gpu.launch import Config, Launch, launch_all
from fastserve_kernels.gpu.operator import Cost, Operator, Shape
from fastserve_kernels.gpu.pair_assembly import power_of_mantissa
from fastserve_kernels.gpu.quantized_configs import candidates
from fastserve_kernels.gpu.quantized_kernel import quantized_linear
from fastserve_kernels.gpu.split_k import arrivals, partial_sums
from fastserve_kernels.gpu.tuning import config_for
from fastserve_kernels.gpu.unpack import bits_of

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
WORDS_OF = {2: torch.int32, 4: torch.int64}
"""A word of two scales, by the bytes of one."""
MOST_WHOLE = {4: 64, 8: 128}
"""By the bits of a code, the zeros that are exact in bfloat16 where the kernel subtracts them."""
FLOAT32 = Config({"ROW_BLOCKS": 2, "BLOCK_M": 16, "K_WARPS": 0, "SPLITS": 1, "SCALED_WEIGHTS": 0}, 4, 2)
"""For activations of float32, which no tensor core takes unshortened: as large as registers allow."""


def check_device(operator: str, device: torch.device) -> None:
    """Raises ValueError for a GPU before the Ampere generation, which has no products of bfloat16."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(
            f"{operator} needs a GPU of compute capability 8.0 or higher; "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
        )


def arrange_scales(scales: Tensor, group_size: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Scales [N, K / G] as the kernel reads them: of 16 bits unless activations are float32; [N] float32 if
    there is one for each row."""
    if scales.shape[1] == 1:
        return scales[:, 0].float().contiguous()
    return arrange_groups(scales.float() if dtype == torch.float32 else half_width(scales), group_size, bits)


def arrange_zeros(zeros: Tensor | None, group_size: int, bits: int, dtype: torch.dtype) -> Tensor | None:
    """Zeros [N, K / G] as planes in the order of the scales, of the activations' dtype.

    The first is what the kernel's codes are less, a whole number unless in float32; there is a second, for
    the rest, only if some zero is not whole. 4-bit codes come to the kernel with 2^m added (`unpack`).
    """
    if zeros is None:
        return None
    arranged = arrange_groups(zeros.float(), group_size, bits)
    if dtype == torch.float32:
        return arranged[None]
    whole = arranged.round().clamp(-MOST_WHOLE[bits], MOST_WHOLE[bits])
    rest = arranged - whole
    base = whole + (power_of_mantissa(DTYPES[dtype]) if bits == 4 else 0.0)
    return torch.stack((base, rest) if bool(rest.any()) else (base,)).to(dtype)


def plan(
    format: str,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    out_features: int,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    config: Config,
) -> list[Launch]:
    """The launch of `quantized_kernel` for x [T, K] whose rows are contiguous, into y [T, N]."""
    config = FLOAT32 if x.dtype == torch.float32 else config
    sizes = config.constants
    tokens, in_features = x.shape
    row_blocks, blocks = codes.shape[:2]
    columns, splits = block_columns(bits_of(format)), sizes["SPLITS"]
    if blocks_of(in_features, columns) != blocks:
        raise ValueError(f"x has {in_features} columns, the weight has blocks for {blocks * columns}")
    per_row = scales.dim() == 1
    arguments = {
        "x": x,
        "codes": codes,
        "scales": scales if per_row else scales.view(WORDS_OF[scales.element_size()]),
        "zeros": None if zeros is None else zeros.view(WORDS_OF[zeros.element_size()]),
        "codebook": codebook,
        "bias": bias,
        "residual": residual,
        "y": y,
        "partial": partial_sums(splits, tokens, out_features, y.device),
        "arrivals": None if splits == 1 else arrivals(y.device),
        "tokens": tokens,
        "out_features": out_features,
        "in_features": in_features,
        "x_row": x.stride(0),
        "residual_row": 0 if residual is None else residual.stride(0),
        "row_blocks": row_blocks,
        "blocks": blocks,
    }
    constants = {
        "FORMAT": format,
        "SCALE": DTYPES[scales.dtype],
        "GROUPS": 0 if per_row else scales.shape[3],
        "ZEROS": 0 if zeros is None else zeros.shape[0],
        "SLICES": 16 // bits_of(format),
        "EVEN": in_features % (columns * max(sizes["K_WARPS"], 1) * splits) == 0,
        **sizes,
    }
    tiles = blocks_of(row_blocks, sizes["ROW_BLOCKS"]) * blocks_of(tokens, sizes["BLOCK_M"])
    return [
        Launch(quantized_linear, (tiles, splits), arguments, constants, config.num_warps, config.num_stages)
    ]


def run(
    operator: Operator,
    shape: Shape,
    x: Tensor,
    weight: tuple[Tensor | int | None, ...],
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """Multiplies by a weight of shape[n] rows as prepared for the operator. The shape has all sizes but m."""
    y = x.new_empty(x.shape[0], shape["n"])
    if x.shape[0] == 0:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    config = config_for(operator, {"m": triton.next_power_of_2(x.shape[0]), **shape}, x.device)
    launch_all(operator.plan(x, *weight, bias, residual, y, config=config))
    return y


def quantized_operator(
    name: str,
    plan: Callable[..., list[Launch]],
    random_weight: Callable[[Shape, torch.device], Weight],
    arranged: Callable[[Weight, torch.dtype], tuple[Tensor | int | None, ...]],
    compiled_shapes: tuple[Shape, ...],
) -> Operator:
    """The entry of a format; `random_weight` has the shape's n, k, group_size, and zeros if it has these."""

    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        arguments = arranged(random_weight(shape, device), dtype)
        x = torch.randn(shape["m"], shape["k"], device=device).to(dtype)
        return (x, *arguments, None, None, x.new_empty(shape["m"], shape["n"]))

    def cost(shape: Shape, dtype: torch.dtype) -> Cost:
        m, n, k, group_size = shape["m"], shape["n"], shape["k"], shape["group_size"]
        bits = bits_of(name.removeprefix("linear_"))
        groups = n * k // group_size * (1 + shape.get("zeros", 0))
        return Cost(n * k * bits // 8 + 2 * groups + dtype.itemsize * m * (n + k), 2 * m * n * k)

    bits = bits_of(name.removeprefix("linear_"))
    return Operator(name, inputs, plan, lambda shape: candidates(shape, bits), cost, compiled_shapes)


def random_groups(shape: Shape, device: torch.device) -> Tensor:
    """Scales [n, k / group_size] bfloat16 from 0.5 to 1.5."""
    groups = shape["k"] // shape["group_size"]
    return torch.rand(shape["n"], groups, device=device).add_(0.5).to(torch.bfloat16)
