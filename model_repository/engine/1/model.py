from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastserve.triton_server.engine import EngineStep


def TritonPythonModel() -> EngineStep:
    """Imported here: the stub completes `triton_python_backend_utils` after it has read this file."""
    from fastserve.triton_server.engine import EngineStep

    return EngineStep()
