from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastserve.ensemble.engine_relay import EngineModel


def TritonPythonModel() -> EngineModel:
    """Imported here: the stub completes `triton_python_backend_utils` after it has read this file."""
    from fastserve.ensemble.engine_relay import EngineModel

    return EngineModel()
