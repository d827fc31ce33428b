"""Unstructured sparse weights on a GPU: their packing, launches and configs.

The kernels are in `bitmap_kernels`. `prepare` keeps two descriptions of where the numbers belong, each of 2
bits per weight at half density, of which a launch reads one: with one or two tokens the lists of eight, with
more the records of 32 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastserve_kernels.formats.prepared import BitmapArguments, Prepared
from fastserve_kernels.formats.sparse import Bitmap, unpack_bits
from fastserve_kernels.formats.weight import Weight
from fastserve_kernels.gpu.bitmap_kernels import SEGMENT_BITS, STEP_BITS, bitmap_few, bitmap_many
from fastserve_kernels.gpu.launch import Config, Launch
from fastserve_kernels.gpu.linear_call import (
    Added,
    call_linear,
    linear_cost,
    random_linear,
    split_k_launch,
    splits_for,
)
from fastserve_kernels.gpu.operator import Cost, Operator, Shape
from fastserve_kernels.gpu.quantized_linear import check_format

_SEGMENT = 1 << int(SEGMENT_BITS.value)
_LIST = 8
_RECORD = 32
_FARTHEST = (1 << int(STEP_BITS.value)) - 1
"""Columns from one number of a list to the next."""


@dataclass(frozen=True)
class _Places:
    """Where the numbers of a weight go."""

    there: Tensor
    """[N, segments, _SEGMENT] bool: the columns that have a number, or a zero in the place of one."""
    slots: Tensor
    """[N, segments, _SEGMENT] int64: the numbers before a column, those that fill lists included."""
    starts: Tensor
    """[segments N + 1] int32: the first list of each row of each segment."""


def _places(kept: Tensor) -> _Places:
    """kept: [N, K] bool."""
    n, k = kept.shape
    kept = torch.nn.functional.pad(kept, (0, -k % _SEGMENT)).view(n, -1, _SEGMENT)
    column = torch.arange(_SEGMENT, device=kept.device)
    last = torch.where(kept, column, -1).cummax(-1).values
    between = (last >= 0) & (last < last[..., -1:]) & ~kept
    there = kept | (between & ((column - last) % _FARTHEST == 0))
    upto = there.cumsum(-1)
    lists = -(-upto[..., -1] // _LIST)
    starts = torch.nn.functional.pad(lists.t().flatten().cumsum(0), (1, 0))
    first = starts[:-1].view(-1, n).t()[..., None] * _LIST
    return _Places(there, first + upto - there.long(), starts.to(torch.int32))


def _words(places: _Places, lists: int) -> Tensor:
    """The columns of each list: [lists] int32."""
    columns = torch.full((lists * _LIST,), -1, device=places.there.device)
    columns[places.slots[places.there]] = places.there.nonzero()[:, 2]
    columns = columns.view(-1, _LIST).cummax(1).values.clamp(min=0)  # a list is filled with its last column
    shifts = int(SEGMENT_BITS.value) + int(STEP_BITS.value) * torch.arange(_LIST - 1, device=columns.device)
    return (columns[:, 0] + (columns.diff(dim=1) << shifts).sum(1)).to(torch.int32)


def _records(places: _Places, in_features: int) -> Tensor:
    """[ceil(K / 32), N] int64: the mask of 32 columns, and above it how many numbers come before them."""
    bits = places.there.flatten(1).unflatten(1, (-1, _RECORD)).long()
    masks = (bits << torch.arange(_RECORD, device=bits.device)).sum(-1)
    before = places.slots.flatten(1)[:, ::_RECORD]
    return (masks | before << 32).t()[: -(-in_features // _RECORD)].contiguous()


def prepare(weight: Weight, device: torch.device, dtype: torch.dtype) -> Prepared:
    """Packs a `Bitmap`: values [lists, 8] in the activations' dtype; in the place of the mask the records;
    in that of row_starts the starts of `_Places`, filled up to a multiple of 4, then the words of the lists.

    Raises ValueError if it is another format, too large, or the device cannot multiply by it.
    """
    weight = check_format(weight, Bitmap, device).to(device)
    kept = unpack_bits(weight.mask, weight.in_features)
    places = _places(kept)
    lists = max(int(places.starts[-1]), 1)
    if lists * _LIST >= 1 << 31:
        raise ValueError(f"Bitmap.values must be below 2^31 when filled up to lists, not {lists * _LIST}")
    values = torch.zeros(lists * _LIST, dtype=dtype, device=device)
    values[places.slots.flatten(1)[:, : weight.in_features][kept]] = weight.values.to(dtype)
    starts = torch.nn.functional.pad(places.starts, (0, -len(places.starts) % 4))
    arguments = (
        values.view(-1, _LIST),
        _records(places, weight.in_features),
        torch.cat((starts, _words(places, lists))),
        weight.out_features,
    )
    return Prepared(weight.operator, arguments, weight.out_features, weight.in_features)


def plan(x: Tensor, weight: BitmapArguments, added: Added, out: Tensor, *, config: Config) -> list[Launch]:
    """x [M, K] and out [M, N] contiguous, of the values' dtype; the weight as `prepare` made it."""
    values, records, lists, _ = weight
    n, k = out.shape[1], x.shape[1]
    constants = {name: size for name, size in config.constants.items() if name != "FEW"}
    if config.constants["FEW"]:
        kernel = bitmap_few
        starts, words = lists[: -(-k // _SEGMENT) * n + 1], lists[-len(values) :]
        pointers = {"x": x, "values": values, "starts": starts, "words": words}
    else:
        kernel, pointers = bitmap_many, {"x": x, "values": values, "records": records}
    return [split_k_launch(kernel, pointers, added, out, k, constants, config)]


def _few(shape: Shape) -> list[Config]:
    """The more lanes a row has, the more is on its way; the fewer, the more often they meet in x."""
    block_m = 1 << (shape["m"] - 1).bit_length()
    segments = -(-shape["k"] // _SEGMENT)
    found = []
    for block_n, lanes in ((16, 8), (8, 16), (16, 16), (4, 32), (32, 8)):
        splits = splits_for(-(-shape["n"] // block_n), segments, wanted=1056)
        for tried in dict.fromkeys((splits, max(splits // 2, 1))):
            sizes = {"FEW": 1, "BLOCK_M": block_m, "BLOCK_N": block_n, "LANES": lanes, "SPLITS": tried}
            found.append(Config(sizes, num_warps=4, num_stages=1))
    return found


def _many(shape: Shape) -> list[Config]:
    m, n = shape["m"], shape["n"]
    block_m = next(size for size in (8, 16, 32, 64) if m <= size or size == 64)
    found = []
    for block_n, warps, stages in ((32, 2, 3), (64, 4, 3), (16, 1, 3), (64, 8, 3)):
        programs = -(-m // block_m) * -(-n // block_n)
        splits = splits_for(programs, -(-shape["k"] // 256), wanted=1056)
        for tried in dict.fromkeys((splits, max(splits // 2, 1))):
            sizes = {"FEW": 0, "BLOCK_M": block_m, "BLOCK_N": block_n, "SPLITS": tried}
            found.append(Config(sizes, warps, stages))
    return found


def candidates(shape: Shape) -> list[Config]:
    """Both kernels where they are near each other: with one token the lists win, with four the records."""
    if shape["m"] <= 2:
        return _few(shape) + _many(shape)[:4]
    if shape["m"] <= 4:
        return _many(shape) + _few(shape)[:4]
    return _many(shape)


def linear_bitmap(x: Tensor, weight: BitmapArguments, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """`reference.linear_bitmap` on a GPU."""
    values, *_, out_features = weight
    percent = max(round(100 * values.numel() / (out_features * x.shape[1])), 1)
    shape = {"m": x.shape[0], "n": out_features, "k": x.shape[1], "percent": percent}
    return call_linear(OPERATORS[0], shape, x, weight, (bias, residual))


def _reference(x: Tensor, weight: BitmapArguments, *__: object) -> Tensor:
    values, records, *_ = weight
    bits = (records.t()[..., None] >> torch.arange(_RECORD, device=records.device) & 1).bool()
    place = (records.t() >> 32)[..., None] + bits.cumsum(-1) - 1
    w = torch.where(bits, values.flatten().float()[place.clamp(min=0)], 0.0).flatten(1)[:, : x.shape[1]]
    return x.float() @ w.t()


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    weights = shape["n"] * shape["k"]
    kept = weights * shape["percent"] // 100
    return linear_cost(shape, dtype, kept * dtype.itemsize + weights // 8, kept)


OPERATORS = (
    Operator(
        name="linear_bitmap",
        inputs=random_linear(lambda w, shape: Bitmap.pack(w, density=shape["percent"] / 100), prepare),
        plan=plan,
        candidates=candidates,
        cost=_cost,
        compiled_shapes=tuple({"m": m, "n": 128, "k": 4096, "percent": 50} for m in (1, 2, 4, 8, 16, 32, 64)),
        reference=_reference,
    ),
)
