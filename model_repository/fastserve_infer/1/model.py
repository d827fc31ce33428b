from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastserve.triton_server.infer import InferStep


def TritonPythonModel() -> InferStep:  # noqa: N802
    """The model. Imported here because the stub completes `triton_python_backend_utils` only after it has read this file."""
    from fastserve.triton_server.infer import InferStep

    return InferStep()
