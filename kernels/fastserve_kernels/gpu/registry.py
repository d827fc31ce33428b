"""All operators that have Triton kernels, gathered from the modules that define them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence

from fastserve_kernels.gpu.operator import Operator
from fastserve_kernels.implementations import GPU_MODULES


@functools.cache
def _all_operators() -> dict[str, Operator]:
    modules = [
        importlib.import_module(f"fastserve_kernels.gpu.{module}")
        for module in dict.fromkeys(GPU_MODULES.values())
    ]
    return {operator.name: operator for module in modules for operator in module.OPERATORS}


def operators(names: Sequence[str] = ()) -> tuple[Operator, ...]:
    """Those named, in that order; all of them if none is named.

    Raises ValueError for a name that no operator has.
    """
    found = _all_operators()
    for name in names:
        if name not in found:
            raise ValueError(f"operator {name!r}: there is none of this name; there are {', '.join(found)}")
    return tuple(found[name] for name in names or found)
