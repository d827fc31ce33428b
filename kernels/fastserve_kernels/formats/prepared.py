"""A weight as the kernels of one device read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

DenseArguments = tuple[Tensor]
"""weight: of a `Dense`."""
IntArguments = tuple[Tensor, Tensor, Tensor | None, int, int]
"""codes, scales, zeros, out_features, group_size: of an `Int4` or `Int8`."""
IntRowsArguments = tuple[
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor,
    int,
    int,
    int,
]
"""The first three `IntArguments` of an `Int4`, then of an `Int8`, None for a part that is not there; rows,
out_features, rows of the `Int4`, group_size."""
NF4Arguments = tuple[Tensor, Tensor, Tensor, int, int]
"""codes, scales, codebook, out_features, group_size."""
FP8Arguments = tuple[Tensor, Tensor, int, int]
"""values, scales, out_features, group_size."""
W8A8Arguments = tuple[Tensor, Tensor, int]
"""values, scales, out_features."""
Sparse24Arguments = tuple[Tensor, Tensor, int]
"""values, indices, out_features."""
Sparse24Int4Arguments = tuple[Tensor, Tensor, Tensor, int, int]
"""codes, indices, scales, out_features, group_size."""
BlockSparseArguments = tuple[Tensor, Tensor, Tensor, int]
"""blocks, row_starts, columns, out_features."""
BitmapArguments = tuple[Tensor, Tensor, Tensor, int]
"""values, mask, row_starts, out_features."""
LowRankArguments = tuple[Tensor, Tensor]
"""down, up."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """What `ops.linear` takes; made by `preparation.prepare`, for one device and dtype of activations."""

    operator: str
    """The operator's name in torch.ops.fastserve: "linear_int4"."""
    arguments: tuple[Tensor | int | None, ...]
    """What the operator takes between x and bias, packed for the device: those named above, each in the place
    of its plain form."""
    out_features: int
    """N."""
    in_features: int
    """K."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, all of which a product reads."""
        return sum(each.nbytes for each in self.arguments if isinstance(each, Tensor))
