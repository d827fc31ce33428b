from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastserve.triton_server.infer import InferStep


def TritonPythonModel() -> InferStep:
    """Imported here: the stub completes `triton_python_backend_utils` after it has read this file."""
    from fastserve.triton_server.infer import InferStep

    return InferStep()
