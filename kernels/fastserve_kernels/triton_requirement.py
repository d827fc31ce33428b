"""The package triton, which kernels on a GPU are compiled by."""

from __future__ import annotations

import importlib.util


def require_triton(operator: str) -> None:
    """Raises ImportError if the package triton, which the operator needs on a GPU, is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise ImportError(
            f"{operator} on a GPU needs the package triton, 3.6 or newer, which is not installed; torch's "
            "CUDA wheels bring it along"
        )
