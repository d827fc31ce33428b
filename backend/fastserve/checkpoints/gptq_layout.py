"""Weights as GPTQModel, AutoGPTQ and Optimum write them, `quant_method: "gptq"`.

- `qweight` int32 [K bits / 32, N]: the codes of a column of this matrix follow each other bit by bit;
- `qzeros` int32 [K / G, N bits / 32]: the zero points of a row of this matrix follow each other bit by bit,
  less 1 each in the format's first version;
- `scales` float16 [K / G, N]: w = (code - zero) * scale;
- `g_idx` int32 [K]: the group of each input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastserve.checkpoints.compressed_checkpoint import ModuleTensors
from fastserve.checkpoints.model_error import ModelError
from fastserve_kernels.formats import Int4, Int8, Weight
from fastserve_kernels.formats.bitpacking import unpack_codes, words_of
from fastserve_kernels.formats.weight import FLOATS, check_tensor, pack_pairs

BITS = (2, 3, 4, 8)
CHECKPOINT_FORMATS = ("gptq", "gptq_v2")


class GptqLayout:
    """The `Layout` of GPTQ checkpoints, both versions."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config` is `quantization_config`. Raises ModelError for a format or a number of bits that is not
        laid out as above."""
        found = "marlin" if config.get("is_marlin_format") else config.get("checkpoint_format") or "gptq"
        if found not in CHECKPOINT_FORMATS:
            allowed = ", ".join(CHECKPOINT_FORMATS)
            raise ModelError(f"quantization_config.checkpoint_format: got {found!r}; allowed: {allowed}")
        if config.get("bits") not in BITS:
            allowed = ", ".join(map(str, BITS))
            raise ModelError(f"quantization_config.bits: got {config.get('bits')!r}; allowed: {allowed}")
        self._bits: int = config["bits"]
        self._zeros_less_one = found == "gptq"

    def applies_to(self, module: ModuleTensors) -> bool:
        """Whether it has a `qweight`, as every module that GPTQ quantized."""
        return "qweight" in module.shapes

    def weight_shape(self, module: ModuleTensors) -> tuple[int, int]:
        """[N, K]; K is the length of `g_idx` if there is one. Raises ValueError if `qweight` is no matrix."""
        words, rows = module.shape("qweight")
        return rows, module.shapes.get("g_idx", (words * 32 // self._bits,))[0]

    def load_weight(self, module: ModuleTensors) -> Weight:
        """An `Int4` of up to 4 bits, else an `Int8`.

        Raises ValueError for wrong tensors, and for groups of columns that are not adjacent.
        """
        module.check_names("qweight", "qzeros", "scales", "g_idx")
        rows, columns = self.weight_shape(module)
        # A tool may give some modules other bits than the config says; the shapes tell.
        bits = module.shapes["qweight"][0] * 32 // columns
        if bits not in BITS:
            raise ValueError(f"qweight has {bits} bits for each weight; allowed: {', '.join(map(str, BITS))}")
        scales, qzeros = module.tensor("scales"), module.tensor("qzeros")
        groups, _ = check_tensor("scales", scales, ("K / G", rows), FLOATS)
        check_tensor("qzeros", qzeros, (groups, words_of(rows, bits)), (torch.int32,))
        if "g_idx" in module.shapes:
            _check_order(module.tensor("g_idx"), columns // groups)
        codes = unpack_codes(module.tensor("qweight").T, bits, columns)
        zeros = _unpack_zeros(qzeros, bits, rows, self._zeros_less_one)
        return weight_from_codes(codes, scales.T, zeros.T, bits)


def weight_from_codes(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Int4 | Int8:
    """The weight [N, K] of codes [N, K] and zeros [N, K / G] uint8, both from 0 to 2^bits - 1, and scales
    [N, K / G]: w = (code - zero) * scale, symmetric where all zeros are 2^(bits - 1)."""
    middle, group_size = 2 ** (bits - 1), codes.shape[1] // scales.shape[1]
    signed = codes.to(torch.int16) - middle
    symmetric = bool((zeros == middle).all())
    offsets = None if symmetric else (zeros.to(torch.int16) - middle).to(scales.dtype).contiguous()
    if bits > 4:
        return Int8(signed.to(torch.int8), scales.contiguous(), offsets, group_size)
    return Int4(
        pack_pairs(signed + 8), scales.contiguous(), None if offsets is None else offsets + 8, group_size
    )


def _unpack_zeros(words: Tensor, bits: int, rows: int, less_one: bool) -> Tensor:
    """The zero points [K / G, N] uint8 of words.

    The tools take and add the 1 from whole words where codes fill these, so that what a zero point of 0
    borrowed comes back; else from each code.
    """
    if not less_one:
        return unpack_codes(words, bits, rows)
    if 32 % bits == 0:
        ones = torch.tensor(sum(1 << place for place in range(0, 32, bits)), dtype=torch.int32)
        return unpack_codes(words + ones, bits, rows)
    return unpack_codes(words, bits, rows) + 1 & 2**bits - 1


def _check_order(groups: Tensor, group_size: int) -> None:
    """Raises ValueError if columns that are not adjacent share a group, as with `desc_act`."""
    if not torch.equal(groups.long(), torch.arange(len(groups)) // group_size):
        raise ValueError(
            "g_idx must be in order (desc_act false, or static groups): adjacent columns share a group in "
            "every format of ours"
        )
