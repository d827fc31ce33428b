"""What the formats share: their base class, checks that name the field, groups, and pairs of codes."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of weights, of scales, and of activations."""
GROUP_SIZES = (32, 64, 128)
"""Columns that may share a scale; all columns of a row may too."""


@dataclass(frozen=True, eq=False)
class Weight(ABC):
    """A linear layer's weight W [N, K] in plain tensors: the same on every device, nothing packed for one.

    All tensors lie on one device. The constructor raises ValueError where a shape, dtype or group size is not
    as the fields say; `pack` makes one of an ordinary tensor.
    """

    operator: ClassVar[str]
    """The operator of torch.ops.fastserve that multiplies by it."""

    # Declared for the type checker only: a dataclass takes an inherited property for a field's default.
    if TYPE_CHECKING:

        @property
        def out_features(self) -> int:
            """N."""

        @property
        def in_features(self) -> int:
            """K."""

    @property
    @abstractmethod
    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """What the operator takes between x and bias, in the plain layout."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """W as an ordinary tensor [N, K] float32."""

    @abstractmethod
    def _check(self) -> None:
        """Raises ValueError where a field is not as it must be."""

    def __post_init__(self) -> None:
        self._check()
        tensors = self._tensors()
        if any(tensor.device != self.device for tensor in tensors.values()):
            found = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
            raise ValueError(f"the tensors of {type(self).__name__} must lie on one device, not {found}")

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each of the N K weights, scales and indices included."""
        return 8 * self.nbytes / (self.out_features * self.in_features)

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        return next(iter(self._tensors().values())).device

    def to(self, device: torch.device | str) -> Self:
        """The weight on another device."""
        return dataclasses.replace(self, **{name: t.to(device) for name, t in self._tensors().items()})


class MatrixWeight(Weight):
    """A weight whose first tensor has a row for each row of W."""

    columns_per_element: ClassVar[int] = 1
    """Columns of W that an element of the first tensor holds."""

    @property
    def out_features(self) -> int:
        """N."""
        return self._first.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.columns_per_element * self._first.shape[1]

    @property
    def _first(self) -> Tensor:
        return next(iter(self._tensors().values()))

    @property
    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """The tensors, N, and the group size if there is one."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        sizes = [self.out_features, *(values.pop(name) for name in ("group_size",) if name in values)]
        return (*values.values(), *sizes)


def check_tensor(
    field: str, tensor: Tensor, shape: Sequence[int | str], dtypes: Sequence[torch.dtype]
) -> tuple[int, ...]:
    """The shape of the tensor. `shape` has a number where it is known, else a word that says what it is.

    Raises ValueError if it has another shape, nothing along some dimension, or none of the dtypes.
    """
    right = tensor.dim() == len(shape) and all(
        size == wanted if isinstance(wanted, int) else size > 0
        for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not right or tensor.dtype not in dtypes:
        wanted = ", ".join(map(str, shape))
        raise ValueError(
            f"{field} must be {names_of(dtypes)} of shape [{wanted}], not {name_of(tensor.dtype)} of shape "
            f"{list(tensor.shape)}"
        )
    return tuple(tensor.shape)


def name_of(dtype: torch.dtype) -> str:
    """The dtype's name: `float16`."""
    return str(dtype).removeprefix("torch.")


def names_of(dtypes: Sequence[torch.dtype]) -> str:
    """The dtypes' names: `float16 or bfloat16`."""
    return " or ".join(map(name_of, dtypes))


def check_weight(weight: Tensor) -> Tensor:
    """An ordinary tensor that is to be packed, detached. Raises ValueError if it is not a finite matrix."""
    check_tensor("weight", weight, ("N", "K"), FLOATS)
    if not weight.isfinite().all():
        raise ValueError("weight must be finite, but has elements that are infinite or not a number")
    return weight.detach()


def check_group_size(group_size: int, in_features: int, sizes: Sequence[int] = GROUP_SIZES) -> None:
    """Raises ValueError unless it is one of the sizes, or all of the columns, and divides these."""
    if group_size not in (*sizes, in_features) or in_features % group_size:
        raise ValueError(
            f"group_size must be one of {', '.join(map(str, sizes))} that divides the {in_features} columns, "
            f"or {in_features} (one group per row), not {group_size}"
        )


def check_even(in_features: int, multiple: int) -> None:
    """Raises ValueError unless the columns are a multiple of what is packed together."""
    if in_features % multiple:
        raise ValueError(f"the columns of the weight must be a multiple of {multiple}, not {in_features}")


def spread(per_group: Tensor, group_size: int) -> Tensor:
    """Values [N, K / G] of groups as values [N, K] float32 of columns."""
    return per_group.float().repeat_interleave(group_size, dim=1)


def pack_pairs(codes: Tensor) -> Tensor:
    """Codes [N, K] from 0 to 15 as bytes [N, K / 2]: the even column in the low nibble."""
    codes = codes.to(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack_pairs(pairs: Tensor) -> Tensor:
    """Bytes [N, K / 2] as codes [N, K] uint8 from 0 to 15."""
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)
