"""One launch of a Triton kernel as a value: what is run, compiled ahead, and counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Argument = Tensor | int | float | None


@dataclass(frozen=True)
class Config:
    """How a kernel is cut into programs; tuned per shape, never chosen while serving."""

    constants: Mapping[str, int]
    """The kernel's compile-time sizes: BLOCK_N, BLOCK_K, SPLIT_K, ..."""
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, and everything it is given."""

    kernel: Any
    """A bare `@triton.jit` function."""
    grid: tuple[int, ...]
    arguments: Mapping[str, Argument]
    """The run-time arguments by parameter name."""
    constants: Mapping[str, Any]
    """The `tl.constexpr` arguments by parameter name."""
    num_warps: int = 4
    num_stages: int = 3

    def run(self) -> None:
        """Enqueues it on the current stream; does nothing if a dimension of the grid is 0."""
        if 0 not in self.grid:
            self.kernel[self.grid](
                **self.arguments, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages
            )


def launch_all(launches: Iterable[Launch]) -> None:
    """Enqueues them in order."""
    for launch in launches:
        launch.run()
