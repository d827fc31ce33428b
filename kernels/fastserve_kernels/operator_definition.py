"""How an operator of torch.ops.fastserve is defined: its schema, its fake, its implementations by device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastserve_kernels.triton_requirement import require_triton

Function = Callable[..., Any]

library = torch.library.Library("fastserve", "DEF")

CPU_IMPLEMENTATIONS: dict[Function, Function] = {}
"""What each operator calls on a CPU, where that is a kernel of ours: for `cpu.recording`."""


def _as_it_is(function: Function) -> Function:
    return function


def define(
    function: Function,
    fake: Function,
    cpu: Function | None = None,
    gpu: bool = True,
    mutates: tuple[str, ...] = (),
    flat: Callable[[Function], Function] = _as_it_is,
    schema: str = "",
) -> Function:
    """Defines the operator of a function of `reference`.

    `flat` makes of an implementation what torch.library calls; `mutates` are the parameters of that which are
    written to. The schema is its annotated signature, unless given.

    Gives the one overload that it has: to find it at each call would cost 0.3 us.
    """
    name = function.__name__
    schema = schema or torch.library.infer_schema(flat(function), mutates_args=mutates)
    # Integers are a layer's sizes, the same at each call: nothing need be traced through them.
    library.define(name + schema.replace("SymInt", "int"))
    torch.library.register_fake(f"fastserve::{name}", fake, lib=library)
    library.impl(name, flat(function), "CompositeExplicitAutograd")
    if cpu is not None:
        library.impl(name, flat(cpu), "CPU")
    if gpu:
        library.impl(name, flat(_triton_implementation(function)), "CUDA")
    overload: Function = getattr(torch.ops.fastserve, name).default
    if cpu is not None:
        CPU_IMPLEMENTATIONS[overload] = flat(cpu)
    return overload


def _triton_implementation(function: Function) -> Function:
    """The function's entry in `gpu.registry`, which is imported at the first call: Triton's compiler takes
    longer to import than all the rest."""
    implementation: Function | None = None

    def call(*arguments: Any) -> Any:
        nonlocal implementation
        if implementation is None:
            require_triton(function.__name__)
            from fastserve_kernels.gpu.registry import IMPLEMENTATIONS

            implementation = IMPLEMENTATIONS[function]
        return implementation(*arguments)

    return call
