from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastserve.ensemble.infer import InferModel


def TritonPythonModel() -> InferModel:
    """Imported here: the stub completes `triton_python_backend_utils` after it has read this file."""
    from fastserve.ensemble.infer import InferModel

    return InferModel()
