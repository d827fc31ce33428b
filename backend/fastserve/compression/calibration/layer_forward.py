"""The forward pass of one decoder layer: its module called as its model calls it, and the inputs of
submodules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class LayerForward:
    """A layer of transformers, and the arguments with which its model calls it."""

    def __init__(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        self.module = module
        self._arguments = arguments

    def __call__(self, hidden: Tensor) -> Tensor:
        """The layer's output [sequences, T, hidden] for such hidden states."""
        out = self.module(hidden, **self._arguments)
        return out[0] if isinstance(out, tuple) else out

    def input(self, name: str, hidden: Tensor) -> Tensor:
        """What enters a module [tokens, K] while `hidden` passes through the layer; it goes no further."""
        return self.inputs((name,), hidden)[0]

    def inputs(self, names: tuple[str, ...], hidden: Tensor) -> tuple[Tensor, ...]:
        """What enters several modules [tokens, K], named in the order in which they run; `hidden` goes no
        further."""
        seen: list[Tensor] = []

        def note(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen.append(given[0].flatten(0, -2))
            if len(seen) == len(names):
                raise _StopForward

        hooks = [
            self.module.get_submodule(name).register_forward_pre_hook(note, prepend=True) for name in names
        ]
        try:
            self(hidden)
        except _StopForward:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return tuple(seen)


class _StopForward(Exception):
    """Ends a forward pass as soon as all inputs that were asked for are seen."""
