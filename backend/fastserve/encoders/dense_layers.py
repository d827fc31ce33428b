"""The linear layers that sentence-transformers may put behind the pooling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.safetensors_checkpoint import SafetensorsCheckpoint
from fastserve.encoders.sentence_transformer import DenseModule

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Tanh": torch.tanh,
    "Identity": lambda x: x,
    "ReLU": functional.relu,
    "GELU": functional.gelu,
}


@dataclass(frozen=True)
class EmbeddingDense:
    """activation(x W^T + b), in float32: there is one vector a text."""

    weight: Tensor
    bias: Tensor | None
    activation: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """[B, K] float32 to [B, N]."""
        return self.activation(functional.linear(x, self.weight, self.bias))


def load_dense(module: DenseModule, device: torch.device) -> EmbeddingDense:
    """The layer in a module's directory. Raises ModelError if its tensors do not fit its config."""
    checkpoint = SafetensorsCheckpoint(module.directory)
    expected: dict[str, tuple[int, ...]] = {"linear.weight": (module.out_features, module.in_features)}
    if module.has_bias:
        expected["linear.bias"] = (module.out_features,)
    if checkpoint.shapes != expected:
        raise ModelError(f"{module.directory}: got tensors {checkpoint.shapes}; allowed: {expected}")
    bias = checkpoint.tensor("linear.bias").float().to(device) if module.has_bias else None
    weight = checkpoint.tensor("linear.weight").float().to(device)
    return EmbeddingDense(weight, bias, _ACTIVATIONS[module.activation])
