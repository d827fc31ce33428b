"""A checkpoint under the names of an encoder's body without a head, whichever way it was saved."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from fastserve.checkpoints.checkpoint import Checkpoint
from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.tensor_problems import shorten, tensor_problems
from fastserve.encoders.tensor_names import TensorNames
from fastserve_kernels.formats import Weight

OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""What norms were called when BERT was saved; transformers reads both."""

Shapes = dict[str, tuple[int, ...]]
logger = logging.getLogger(__name__)


class EncoderCheckpoint:
    """A `Checkpoint` whose names lack what a model with a head puts before them: `embeddings.norm.weight`."""

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        self._checkpoint = checkpoint
        self._stored = {_name_without(prefix, name): name for name in checkpoint.shapes}
        self.shapes = {name: checkpoint.shapes[stored] for name, stored in self._stored.items()}

    @property
    def dtype(self) -> torch.dtype:
        """That of the checkpoint."""
        return self._checkpoint.dtype

    def read(self, name: str, destination: Tensor, rows: range | None = None) -> None:
        """See `Checkpoint`."""
        self._checkpoint.read(self._stored[name], destination, rows)

    def read_packed(self, name: str, exact: bool, rows: range | None = None) -> Weight | None:
        """See `Checkpoint`."""
        return self._checkpoint.read_packed(self._stored[name], exact, rows)

    def check(self, expected: Shapes, names: TensorNames) -> None:
        """Raises ModelError if tensors are missing, misshapen, or of a part of the body that is not computed.

        Tensors of heads that are not used here (that of the training, say) are passed over in a logged line.
        """
        others = [name for name in self.shapes if name not in expected]
        in_body = [name for name in others if _is_in_body(name, names)]
        problems = tensor_problems(
            missing=[name for name in expected if name not in self.shapes],
            misshapen=[
                f"{name} {list(self.shapes[name])} instead of {list(shape)}"
                for name, shape in expected.items()
                if name in self.shapes and self.shapes[name] != shape
            ],
            unexpected=in_body,
        )
        if problems:
            raise ModelError(f"the checkpoint does not fit its config: {problems}")
        unused = [name for name in others if name not in in_body and not _is_buffer(name)]
        if unused:
            logger.info("tensors of heads that are not used here: %s", shorten(unused))


def _name_without(prefix: str, name: str) -> str:
    name = name.removeprefix(prefix)
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _is_in_body(name: str, names: TensorNames) -> bool:
    parts: Iterable[str] = (names.layer.partition("{")[0], "embeddings.", "encoder.", "final_norm.")
    return name.startswith(tuple(parts)) and not _is_buffer(name)


def _is_buffer(name: str) -> bool:
    """Whether it is a table of numbers from 0 on, which old versions saved."""
    return name in ("embeddings.position_ids", "embeddings.token_type_ids")
