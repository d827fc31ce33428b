from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastserve.ensemble.postprocess import PostprocessModel


def TritonPythonModel() -> PostprocessModel:
    """Imported here: the stub completes `triton_python_backend_utils` after it has read this file."""
    from fastserve.text.torch_exclusion import keep_torch_out

    keep_torch_out()
    from fastserve.ensemble.postprocess import PostprocessModel

    return PostprocessModel()
