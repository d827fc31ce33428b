from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastserve.ensemble.scheduler import SchedulerModel


def TritonPythonModel() -> SchedulerModel:
    """Imported here: the stub completes `triton_python_backend_utils` after it has read this file."""
    from fastserve.ensemble.scheduler import SchedulerModel

    return SchedulerModel()
