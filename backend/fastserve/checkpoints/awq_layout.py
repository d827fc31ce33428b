"""Weights as AutoAWQ and its successors write them, `quant_method: "awq"`, for their GEMM kernel.

- `qweight` int32 [K, N / 8]: a word has the codes of eight neighbouring rows of W [N, K], ordered as `ROWS`;
- `qzeros` int32 [K / G, N / 8]: a word has the zero points of eight neighbouring rows, in the same order;
- `scales` float16 [K / G, N]: w = (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastserve.checkpoints.compressed_checkpoint import ModuleTensors
from fastserve.checkpoints.gptq_layout import weight_from_codes
from fastserve.checkpoints.model_error import ModelError
from fastserve_kernels.formats import Weight
from fastserve_kernels.formats.bitpacking import unpack_codes
from fastserve_kernels.formats.weight import FLOATS, check_tensor

BITS = 4
ROWS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight rows each code of a word belongs to, the lowest first."""


class AwqLayout:
    """The `Layout` of AutoAWQ's GEMM kernel."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config` is `quantization_config`. Raises ModelError for what is laid out otherwise."""
        allowed = {
            "bits": (config.get("bits", config.get("w_bit")), BITS),
            "version": (str(config.get("version") or config.get("format") or "gemm").lower(), "gemm"),
            "zero_point": (config.get("zero_point", True), True),
        }
        for field, (found, wanted) in allowed.items():
            if found != wanted:
                raise ModelError(f"quantization_config.{field}: got {found!r}; allowed: {wanted!r}")

    def applies_to(self, module: ModuleTensors) -> bool:
        """Whether it has a `qweight`, as every module that AWQ quantized."""
        return "qweight" in module.shapes

    def weight_shape(self, module: ModuleTensors) -> tuple[int, int]:
        """[N, K], from the shape of `qweight`. Raises ValueError if that is no matrix."""
        columns, words = module.shape("qweight")
        return words * len(ROWS), columns

    def load_weight(self, module: ModuleTensors) -> Weight:
        """An `Int4` with zero points, or without where all are 8. Raises ValueError for wrong tensors."""
        module.check_names("qweight", "qzeros", "scales")
        rows, _ = self.weight_shape(module)
        scales, qzeros = module.tensor("scales"), module.tensor("qzeros")
        check_tensor("scales", scales, ("K / G", rows), FLOATS)
        check_tensor("qzeros", qzeros, (len(scales), rows // len(ROWS)), (torch.int32,))
        codes = _unpack(module.tensor("qweight"))
        return weight_from_codes(codes.T.contiguous(), scales.T, _unpack(qzeros).T, BITS)


def _unpack(words: Tensor) -> Tensor:
    """Codes [M, N] uint8 of words [M, N / 8]."""
    rows = len(ROWS) * words.shape[1]
    codes = unpack_codes(words, BITS, rows).unflatten(1, (-1, len(ROWS)))
    ordered = torch.empty_like(codes)
    ordered[..., list(ROWS)] = codes
    return ordered.flatten(1)
