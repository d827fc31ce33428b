"""Expert routing, recorded in one pass over a mixture of experts and replayed in another.

Two experts with nearly the same score change places when a score is rounded otherwise, and the token's hidden
state is another one from there on: no rounding error, and none of attention either. So passes whose attention
is compared take the same experts. transformers' routers choose them with `topk`, which both modes intercept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TOPK = (torch.topk, Tensor.topk)


class RecordRouting(TorchFunctionMode):
    """A context in which every choice of experts is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: list[Tensor] = []
        """The experts of each router call, in order: [T, k], with more dimensions between them for groups."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _TOPK:
            self.indices.append(result.indices)
        return result


class ReplayRouting(TorchFunctionMode):
    """A context in which tokens take the experts of a recorded pass, where they are at positions `tokens`."""

    def __init__(self, recorded: RecordRouting, tokens: Tensor) -> None:
        super().__init__()
        self._recorded: Iterator[Tensor] = iter(recorded.indices)
        self._tokens = tokens

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in _TOPK:
            return result
        recorded = next(self._recorded, None)
        if recorded is None or recorded.shape[1:] != result.indices.shape[1:]:
            return result
        chosen = recorded[self._tokens]
        scores, dim = args[0], args[2] if len(args) > 2 else kwargs.get("dim", -1)
        return torch.return_types.topk((scores.gather(dim, chosen), chosen))
