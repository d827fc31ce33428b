"""Weights as checkpoints of the `compressed-tensors` library hold them, to and from the plain formats.

- `pack-quantized`, of `Int4` and `Int8`, in the 2 to 8 bits that the codes need: `weight_packed` int32 [N,
  ceil(K bits / 32)] as in `code_words`; `weight_scale`; `weight_shape` [2]; `weight_zero_point` int32 [ceil(N
  bits / 32), K / G], packed along the rows. Codes are unsigned: less 2^(bits - 1) they are the number; zero
  points too. Old versions began each word with a new code.
- `int-quantized` and `naive-quantized`, of `Int8`, and of `W8A8` where activations are rounded too: `weight`
  int8 [N, K]; `weight_scale`; `weight_zero_point` int8.
- `float-quantized` and `naive-quantized`, of `FP8`: `weight` float8_e4m3fn [N, K]; `weight_scale`.
- `sparse-24-bitmask`, of `Sparse24`: `compressed` [N, K / 2]; `bitmask` uint8 [N, K / 8]; `shape` [2, 1].
- `sparse-bitmask`, of `Bitmap`: `compressed` [nnz]; `bitmask` uint8 [N, ceil(K / 8)]; `row_offsets` int64
  [N]; `shape` [2].
- The last two with a `weight_scale` are `int-quantized` or `float-quantized`, `compressed` for `weight`.

`weight_scale` is [1], [N, 1], [N, K / G] or, of blocks, [N / rows, K / columns]. The sparse layouts are those
of versions up to 0.12; later ones do not write them. `marlin-24` has no conversion: it is the order in which
one kernel reads, and the library itself never could read it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastserve_kernels.formats import FP8, W8A8, Bitmap, Int4, Int8, Sparse24, Weight
from fastserve_kernels.formats.bitpacking import pack_codes, unpack_codes, words_of
from fastserve_kernels.formats.sparse import unpack_bits
from fastserve_kernels.formats.weight import check_even, check_tensor, pack_pairs, unpack_pairs

COLUMNS_OF_MASK = {
    0b0011: 0b0100,
    0b0101: 0b1000,
    0b1001: 0b1100,
    0b0110: 0b1001,
    0b1010: 0b1101,
    0b1100: 0b1110,
}
"""The four bits of `Sparse24.indices` for the four bits of a mask, lowest column first."""

PER_TOKEN_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
"""How `W8A8` rounds activations, in the words of the library."""


@dataclass(frozen=True, eq=False)
class CompressedTensors:
    """The weight of one layer, without its bias, as a checkpoint has it."""

    format: str
    """The format that `quantization_config`, its `config_groups` entry or `sparsity_config` names."""
    tensors: Mapping[str, Tensor]
    """By name, less the layer's: "weight_packed"."""
    scheme: Mapping[str, Any]
    """The entry of `config_groups` for the layer, as JSON has it: "weights", "input_activations". Empty for
    the sparse layouts."""


def from_compressed_tensors(compressed: CompressedTensors) -> Weight:
    """The weight in a format of ours, code for code.

    Activations that the scheme rounds to eight-bit floats stay as they are: `FP8` rounds weights only.

    Raises ValueError if the layout, a tensor or the scheme is none that a format of ours holds, and says why.
    """
    if compressed.format not in LAYOUTS:
        raise ValueError(f"format must be {', '.join(LAYOUTS)}, not {compressed.format!r}")
    tensors, scheme = dict(compressed.tensors), compressed.scheme
    if scheme.get("output_activations"):
        raise ValueError("output_activations must be absent: no operator rounds what it returns")
    weight = _READERS[compressed.format](tensors, scheme)
    if tensors:
        raise ValueError(f"{compressed.format} has no tensors of these names: {', '.join(tensors)}")
    return weight


def to_compressed_tensors(weight: Weight) -> CompressedTensors:
    """The weight in the layout that the library itself would choose for it, code for code.

    Raises ValueError if no layout holds it: another format than those above, or zeros that are no whole
    numbers.
    """
    if type(weight) not in _WRITERS:
        formats = ", ".join(kind.__name__ for kind in _WRITERS)
        raise ValueError(f"compressed-tensors has layouts for {formats}, none for {type(weight).__name__}")
    return _WRITERS[type(weight)](weight)


def _take(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{name} is missing; found {', '.join(tensors) or 'no tensors'}")
    return tensors.pop(name)


def _of_weights(scheme: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments: Mapping[str, Any] | None = scheme.get("weights")
    if not arguments:
        raise ValueError('scheme must say under "weights" how these are quantized, but does not')
    return arguments


def _from_pack_quantized(tensors: dict[str, Tensor], scheme: Mapping[str, Any]) -> Weight:
    arguments = _of_weights(scheme)
    bits = arguments.get("num_bits", 8)
    if bits not in range(2, 9) or arguments.get("type", "int") != "int":
        raise ValueError(f"weights must be integers of 2 to 8 bits, not {arguments.get('type')} of {bits}")
    if scheme.get("input_activations"):
        raise ValueError(
            "input_activations must be absent: packed weights meet activations that are not rounded"
        )
    n, k = _take(tensors, "weight_shape").flatten().tolist()
    codes = _unpack(_take(tensors, "weight_packed"), "weight_packed", (n, k), bits)
    scales, group_size = _scales(_take(tensors, "weight_scale"), (n, k), arguments)
    _check_order(tensors.pop("weight_g_idx", None), k, group_size)
    zeros = tensors.pop("weight_zero_point", None)
    if zeros is not None and zeros.dtype == torch.int32:
        zeros = _unpack(zeros.T, "weight_zero_point", (scales.shape[1], n), bits).T
    zeros = _zeros(zeros, scales, arguments)
    if bits > 4:
        return Int8(codes, scales, zeros, group_size)
    check_even(k, 2)
    return Int4(pack_pairs(codes + 8), scales, None if zeros is None else zeros + 8, group_size)


def _from_quantized(tensors: dict[str, Tensor], scheme: Mapping[str, Any]) -> Weight:
    arguments, activations = _of_weights(scheme), scheme.get("input_activations")
    values = _with_zeros(tensors) if "bitmask" in tensors else _take(tensors, "weight")
    n, k = check_tensor("weight", values, ("N", "K"), (torch.int8, torch.float8_e4m3fn))
    scales, group_size = _scales(_take(tensors, "weight_scale"), (n, k), arguments)
    zeros = _zeros(tensors.pop("weight_zero_point", None), scales, arguments)
    if values.dtype == torch.float8_e4m3fn:
        if zeros is not None or (activations and activations.get("type") != "float"):
            raise ValueError("float weights must have no zero points, and activations of type float or none")
        for unused in ("input_scale", "input_zero_point"):
            tensors.pop(unused, None)
        return FP8(values, scales, group_size)
    if not activations:
        return Int8(values, scales, zeros, group_size)
    differing = {
        key: activations.get(key) for key, wanted in PER_TOKEN_INT8.items() if activations.get(key) != wanted
    }
    if differing:
        raise ValueError(f"input_activations must be absent or {PER_TOKEN_INT8}, not {differing}")
    if zeros is not None or group_size != k:
        raise ValueError("weights must be symmetric with a scale per row where activations are rounded too")
    return W8A8(values, scales[:, 0].float())


def _with_zeros(tensors: dict[str, Tensor]) -> Tensor:
    """The quantized values [N, K] of old sparse layouts, which hold those that are not zero."""
    n, k = _take(tensors, "shape").flatten().tolist()
    bitmask, kept = _take(tensors, "bitmask"), _take(tensors, "compressed")
    check_tensor("bitmask", bitmask, (n, -(-k // 8)), (torch.uint8,))
    tensors.pop("row_offsets", None)
    values = torch.zeros(n, k, dtype=torch.uint8, device=kept.device)  # 0 has no bits in any dtype
    return values.masked_scatter_(unpack_bits(bitmask, k), kept.view(torch.uint8)).view(kept.dtype)


def _from_sparse_24(tensors: dict[str, Tensor], scheme: Mapping[str, Any]) -> Weight:
    n, k = _take(tensors, "shape").flatten().tolist()
    bitmask = _take(tensors, "bitmask")
    check_tensor("bitmask", bitmask, (n, k // 8), (torch.uint8,))
    table = torch.full((16,), 255, dtype=torch.uint8, device=bitmask.device)
    for mask, columns in COLUMNS_OF_MASK.items():
        table[mask] = columns
    nibbles = table[unpack_pairs(bitmask).int()]
    if (nibbles == 255).any():
        raise ValueError("bitmask must have two bits for each four columns")
    return Sparse24(_take(tensors, "compressed"), pack_pairs(nibbles))


def _from_bitmask(tensors: dict[str, Tensor], scheme: Mapping[str, Any]) -> Weight:
    _, k = _take(tensors, "shape").flatten().tolist()
    values = _take(tensors, "compressed")
    starts = torch.nn.functional.pad(_take(tensors, "row_offsets"), (0, 1), value=len(values))
    return Bitmap(values, _take(tensors, "bitmask"), starts.to(torch.int32), k)


def bits_of(weight: Int4 | Int8) -> int:
    """The fewest bits, 2 or more for `Int4` and 5 or more for `Int8`, whose signed numbers hold its codes and
    zeros. A weight that was rounded to b bits, with the middle code at 8 (`Int4`) or 0 (`Int8`), has b.
    """
    codes, zeros = _signed(weight)
    numbers = [*codes.aminmax(), *(() if zeros is None else zeros.aminmax())]
    # -8 needs as many bits as 7: ~x is -x - 1.
    largest = max(number if number >= 0 else ~number for number in map(round, map(float, numbers)))
    return max(2 if isinstance(weight, Int4) else 5, 1 + largest.bit_length())


def _signed(weight: Int4 | Int8) -> tuple[Tensor, Tensor | None]:
    """Codes [N, K] int8, and zeros [N, K / G], less the middle code."""
    if isinstance(weight, Int8):
        return weight.values, weight.zeros
    return unpack_pairs(weight.codes).to(torch.int8) - 8, None if weight.zeros is None else weight.zeros - 8


def _to_pack_quantized(weight: Int4 | Int8) -> CompressedTensors:
    (codes, zeros), bits = _signed(weight), bits_of(weight)
    most = 4 if isinstance(weight, Int4) else 8
    if zeros is not None and ((zeros != zeros.round()).any() or bits > most):
        raise ValueError(f"zeros must be whole numbers of {most} bits: pack-quantized stores them as such")
    tensors = {
        "weight_packed": _pack(codes, bits),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor([weight.out_features, weight.in_features]),
    }
    if zeros is not None:
        tensors["weight_zero_point"] = _pack(zeros.T.to(torch.int8), bits).T.contiguous()
    return CompressedTensors("pack-quantized", tensors, _scheme(weight, bits, "int", zeros is None))


def _to_int_quantized(weight: W8A8) -> CompressedTensors:
    tensors = {"weight": weight.values, "weight_scale": weight.scales[:, None]}
    scheme = _scheme(weight, 8, "int", True) | {"input_activations": PER_TOKEN_INT8}
    return CompressedTensors("int-quantized", tensors, scheme)


def _to_naive_quantized(weight: FP8) -> CompressedTensors:
    tensors = {"weight": weight.values, "weight_scale": weight.scales}
    return CompressedTensors("naive-quantized", tensors, _scheme(weight, 8, "float", True))


def _to_sparse_24(weight: Sparse24) -> CompressedTensors:
    table = torch.zeros(16, dtype=torch.uint8, device=weight.device)
    for mask, columns in COLUMNS_OF_MASK.items():
        table[columns] = mask
    tensors = {
        "shape": torch.tensor([[weight.out_features], [weight.in_features]]),
        "compressed": weight.values,
        "bitmask": pack_pairs(table[unpack_pairs(weight.indices).int()]),
    }
    return CompressedTensors("sparse-24-bitmask", tensors, {})


def _to_bitmask(weight: Bitmap) -> CompressedTensors:
    tensors = {
        "shape": torch.tensor([weight.out_features, weight.in_features]),
        "compressed": weight.values,
        "bitmask": weight.mask,
        "row_offsets": weight.row_starts[:-1].long(),
    }
    return CompressedTensors("sparse-bitmask", tensors, {})


def _scheme(weight: Int4 | Int8 | W8A8 | FP8, bits: int, kind: str, symmetric: bool) -> dict[str, Any]:
    """The entry of `config_groups`, less its targets."""
    group_size = weight.in_features if isinstance(weight, W8A8) else weight.group_size
    per_row = group_size == weight.in_features
    arguments = {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": "channel" if per_row else "group",
        "group_size": None if per_row else group_size,
        "dynamic": False,
    }
    return {"weights": arguments, "input_activations": None, "output_activations": None}


_READERS: dict[str, Callable[[dict[str, Tensor], Mapping[str, Any]], Weight]] = {
    "pack-quantized": _from_pack_quantized,
    "int-quantized": _from_quantized,
    "float-quantized": _from_quantized,
    "naive-quantized": _from_quantized,
    "sparse-24-bitmask": _from_sparse_24,
    "sparse-bitmask": _from_bitmask,
}
LAYOUTS = tuple(_READERS)
"""Those that can be read, by the library's names."""
_WRITERS: dict[type[Weight], Callable[[Any], CompressedTensors]] = {
    Int4: _to_pack_quantized,
    Int8: _to_pack_quantized,
    W8A8: _to_int_quantized,
    FP8: _to_naive_quantized,
    Sparse24: _to_sparse_24,
    Bitmap: _to_bitmask,
}


def _unpack(packed: Tensor, field: str, shape: tuple[int, int], bits: int) -> Tensor:
    """Signed numbers [N, K] int8 of words [N, ceil(K bits / 32)]."""
    rows, columns = shape
    per_word = 32 // bits
    if packed.shape == (rows, -(-columns // per_word)) and packed.shape[1] > words_of(columns, bits):
        codes = unpack_codes(packed.reshape(-1, 1), bits, per_word).reshape(rows, -1)[:, :columns]
    else:
        check_tensor(field, packed, (rows, words_of(columns, bits)), (torch.int32,))
        codes = unpack_codes(packed, bits, columns)
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """The reverse of `_unpack`, as today's versions of the library have it."""
    return pack_codes((codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8), bits)


def _scales(scales: Tensor, shape: tuple[int, int], arguments: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Scales [N, K / G], and G."""
    n, k = shape
    size, block = arguments.get("group_size") or -1, arguments.get("block_structure")
    strategy = arguments.get("strategy") or ("group" if size > 0 else "channel" if size == -1 else "tensor")
    if strategy == "tensor" and scales.numel() == 1:
        return scales.reshape(1, 1).repeat(n, 1), k
    if strategy == "channel":
        return scales[:, None] if scales.dim() == 1 else scales, k
    if strategy == "group":
        return scales, size
    if strategy == "block" and block:
        return scales.repeat_interleave(block[0], dim=0)[:n], block[1]
    raise ValueError(
        "weights.strategy must be tensor (with one scale), channel, group or block (with a block_structure), "
        f"not {strategy} with scales of shape {list(scales.shape)}"
    )


def _zeros(zeros: Tensor | None, scales: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
    """Signed zero points [N, K / G] of the scales' dtype; None if they are 0 by the scheme."""
    symmetric = arguments.get("symmetric", True)
    if zeros is None and not symmetric:
        raise ValueError("weight_zero_point is missing, and weights.symmetric is false")
    if zeros is None or (symmetric and not zeros.float().any()):
        return None
    return zeros.to(scales.dtype).expand(scales.shape).contiguous()


def _check_order(groups: Tensor | None, columns: int, group_size: int) -> None:
    """Raises ValueError if columns that are not adjacent share a group; -1 stands for columns in order."""
    if groups is not None and not (groups == -1).all():
        in_order = torch.arange(columns, device=groups.device) // group_size
        if not torch.equal(groups.long(), in_order):
            raise ValueError(
                "weight_g_idx must be in order: adjacent columns share a group in every format of ours"
            )
