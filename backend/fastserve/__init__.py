"""FastServe: large language models inside NVIDIA Triton Inference Server.

`Model`, `ModelServer` and `Encoder` are resolved on first use, so that a process which only needs the types
(a step of the ensemble, the launcher) never loads torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastserve.embedded import Model, ModelServer
    from fastserve.encoders.encoder import Encoder

__all__ = ["Encoder", "Model", "ModelServer"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Encoder":
        from fastserve.encoders.encoder import Encoder

        return Encoder
    if name in __all__:
        from fastserve import embedded

        return getattr(embedded, name)
    raise AttributeError(f"module 'fastserve' has no attribute {name!r}")
