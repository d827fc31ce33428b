"""Products with weights of few bits: what their formats share of preparing, planning, tuning and running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve_kernels.formats.prepared import Prepared
from fastserve_kernels.formats.weight import Weight
from fastserve_kernels.gpu.fragments import block_columns, blocks_of, half_width, pack_groups
from fastserve_kernels.gpu.launch import Config, Launch, launch_all
from fastserve_kernels.gpu.linear_call import Added, Arguments, LinearInputs, rows_contiguous
from fastserve_kernels.gpu.operator import Cost, Operator, Shape
from fastserve_kernels.gpu.pair_assembly import power_of_mantissa
from fastserve_kernels.gpu.quantized_configs import candidates
from fastserve_kernels.gpu.quantized_kernel import quantized_linear
from fastserve_kernels.gpu.split_k import arrivals, partial_sums
from fastserve_kernels.gpu.tuning import config_for
from fastserve_kernels.gpu.unpack import bits_of

AnyWeight = TypeVar("AnyWeight", bound=Weight)
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
WORDS_OF = {2: torch.int32, 4: torch.int64}
"""A word of two scales, by the bytes of one."""
MAX_WHOLE = {4: 64, 8: 128}
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


def check_format(weight: Weight, kind: type[AnyWeight], device: torch.device) -> AnyWeight:
    """The weight. Raises ValueError if it is another format, or the device cannot multiply by it."""
    if not isinstance(weight, kind):
        raise ValueError(f"weight must be {kind.__name__}, not {type(weight).__name__}")
    check_device(weight.operator, device)
    return weight


def pack_scales(scales: Tensor, group_size: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Scales [N, K / G] as the kernel reads them: of 16 bits unless activations are float32; [N] float32 if
    there is one for each row."""
    if scales.shape[1] == 1:
        return scales[:, 0].float().contiguous()
    return pack_groups(scales.float() if dtype == torch.float32 else half_width(scales), group_size, bits)


def pack_zeros(zeros: Tensor | None, group_size: int, bits: int, dtype: torch.dtype) -> Tensor | None:
    """Zeros [N, K / G] as planes in the order of the scales, of the activations' dtype.

    The first is what the kernel's codes are less, a whole number unless in float32; there is a second, for
    the rest, only if some zero is not whole. 4-bit codes come to the kernel with 2^m added (`unpack`).
    """
    if zeros is None:
        return None
    packed = pack_groups(zeros.float(), group_size, bits)
    if dtype == torch.float32:
        return packed[None]
    whole = packed.round().clamp(-MAX_WHOLE[bits], MAX_WHOLE[bits])
    rest = packed - whole
    base = whole + (power_of_mantissa(DTYPES[dtype]) if bits == 4 else 0.0)
    return torch.stack((base, rest) if bool(rest.any()) else (base,)).to(dtype)


class QuantizedLinear:
    """The operator of one format of `quantized_kernel`: its implementation, launches, and entry for tuning.

    `tables` names what the weight's arguments have between scales and out_features: "zeros" or "codebook", or
    nothing. The arguments are (codes, scales, *tables, out_features, group_size), as `pack` makes them.
    """

    def __init__(
        self,
        format: str,
        tables: tuple[str, ...],
        pack: Callable[[Any, torch.dtype], Arguments],
        random_weight: Callable[[Shape, torch.device], Weight],
        compiled_shapes: tuple[Shape, ...],
    ) -> None:
        self._format = format
        self._bits = bits_of(format)
        self._tables = tables
        self._pack = pack
        self._random_weight = random_weight
        self.entry = Operator(
            name=f"linear_{format}",
            inputs=self._inputs,
            plan=self.plan,
            candidates=lambda shape: candidates(shape, self._bits),
            cost=self._cost,
            compiled_shapes=compiled_shapes,
        )

    def prepare(self, weight: Weight, device: torch.device, dtype: torch.dtype) -> Prepared:
        """The weight packed for the kernel. Raises ValueError if the GPU is too old."""
        check_device(weight.operator, device)
        arguments = self._pack(weight.to(device), dtype)
        return Prepared(weight.operator, arguments, weight.out_features, weight.in_features)

    def __call__(self, x: Tensor, weight: Any, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """x [T, K] times the weight transposed, plus bias [N] and residual [T, N]: [T, N] of x's dtype."""
        _, _, *tables, out_features, group_size = weight
        shape = {"n": out_features, "k": x.shape[1], "group_size": group_size}
        if "zeros" in self._tables:
            shape["zeros"] = 0 if tables[0] is None else tables[0].shape[0]
        y = x.new_empty(x.shape[0], out_features)
        if x.shape[0] == 0:
            return y
        x, bias, residual = rows_contiguous(x, bias, residual)
        config = config_for(self.entry, {"m": triton.next_power_of_2(x.shape[0]), **shape}, x.device)
        launch_all(self.plan(x, weight, (bias, residual), y, config=config))
        return y

    def plan(self, x: Tensor, weight: Any, added: Added, y: Tensor, *, config: Config) -> list[Launch]:
        """The launch for x [T, K] whose rows are contiguous, into y [T, N].

        Raises ValueError if x has more or fewer columns than the weight has blocks for.
        """
        (codes, scales, *tables, out_features, _), (bias, residual) = weight, added
        named = dict(zip(self._tables, tables, strict=True))
        zeros = named.get("zeros")
        config = FLOAT32 if x.dtype == torch.float32 else config
        sizes = config.constants
        tokens, in_features = x.shape
        row_blocks, blocks = codes.shape[:2]
        columns, splits = block_columns(self._bits), sizes["SPLITS"]
        if blocks_of(in_features, columns) != blocks:
            raise ValueError(f"x has {in_features} columns, the weight has blocks for {blocks * columns}")
        per_row = scales.dim() == 1
        pointers = {
            "x": x,
            "codes": codes,
            "scales": scales if per_row else scales.view(WORDS_OF[scales.element_size()]),
            "zeros": None if zeros is None else zeros.view(WORDS_OF[zeros.element_size()]),
            "codebook": named.get("codebook"),
            "bias": bias,
            "residual": residual,
            "y": y,
            "partial": partial_sums(splits, tokens, out_features, y.device),
            "arrivals": None if splits == 1 else arrivals(y.device),
        }
        numbers = {
            "tokens": tokens,
            "out_features": out_features,
            "in_features": in_features,
            "x_row": x.stride(0),
            "residual_row": 0 if residual is None else residual.stride(0),
            "row_blocks": row_blocks,
            "blocks": blocks,
        }
        constants = {
            "FORMAT": self._format,
            "SCALE": DTYPES[scales.dtype],
            "GROUPS": 0 if per_row else scales.shape[3],
            "ZEROS": 0 if zeros is None else zeros.shape[0],
            "SLICES": 16 // self._bits,
            "EVEN": in_features % (columns * max(sizes["K_WARPS"], 1) * splits) == 0,
            **sizes,
        }
        tiles = blocks_of(row_blocks, sizes["ROW_BLOCKS"]) * blocks_of(tokens, sizes["BLOCK_M"])
        arguments_by_name = {**pointers, **numbers}
        return [
            Launch(
                quantized_linear,
                (tiles, splits),
                arguments_by_name,
                constants,
                config.num_warps,
                config.num_stages,
            )
        ]

    def _inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> LinearInputs:
        arguments = self._pack(self._random_weight(shape, device), dtype)
        x = torch.randn(shape["m"], shape["k"], device=device).to(dtype)
        return (x, arguments, (None, None), x.new_empty(shape["m"], shape["n"]))

    def _cost(self, shape: Shape, dtype: torch.dtype) -> Cost:
        m, n, k, group_size = shape["m"], shape["n"], shape["k"], shape["group_size"]
        groups = n * k // group_size * (1 + shape.get("zeros", 0))
        return Cost(n * k * self._bits // 8 + 2 * groups + dtype.itemsize * m * (n + k), 2 * m * n * k)


def random_zeros(shape: Shape, device: torch.device) -> Tensor | None:
    """Zero points [n, k / group_size]: whole ones where shape["zeros"] is 1, none where it is 0."""
    if not shape["zeros"]:
        return None
    zeros = random_groups(shape, device) * 8
    return zeros.round() if shape["zeros"] == 1 else zeros


def random_groups(shape: Shape, device: torch.device) -> Tensor:
    """Scales [n, k / group_size] bfloat16 from 0.5 to 1.5."""
    groups = shape["k"] // shape["group_size"]
    return torch.rand(shape["n"], groups, device=device).add_(0.5).to(torch.bfloat16)
