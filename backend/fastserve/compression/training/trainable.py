"""Conversion of a state to a model whose parameters can be trained, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastserve.compression.errors import RecipeError
from fastserve.compression.sparsity_patterns import mask_of, repack
from fastserve.compression.state.model_state import Part, State, StateWriter
from fastserve_kernels.formats import Bitmap, BlockSparse, Dense, LowRank, Sparse24, Weight

TRAINABLE = (Dense, Bitmap, BlockSparse, Sparse24, LowRank)
DOWN, UP = "0", "1"
"""The factors of a low-rank linear are the modules of these names under its own."""


@dataclass(frozen=True)
class Trainable:
    """A transformers model in float32 and what its training must leave as it is."""

    model: PreTrainedModel
    masks: dict[str, Tensor]
    """True where a weight is kept, by the parameter's name; those of a pruned linear that are not stay 0."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: found for name, found in self.model.named_parameters() if found.requires_grad}

    def mask_gradients(self) -> None:
        """Drops what would change a weight that was left out."""
        for name, mask in self.masks.items():
            gradient = self.model.get_parameter(name).grad
            if gradient is not None:
                gradient.mul_(mask)


def trainable(state: State, device: torch.device, embeddings: bool) -> Trainable:
    """The model of a state. Its embedding and its head train too if `embeddings`.

    Raises RecipeError for a linear that is no float matrix.
    """
    model = state.transformers_model(torch.float32, device)
    masks: dict[str, Tensor] = {}
    for index in range(state.num_layers):
        for local, weight in state.linears(index).items():
            name = f"{state.meta_model.prefix}{index}.{local}"
            if not isinstance(weight, TRAINABLE):
                raise RecipeError(
                    f"{name} is {type(weight).__name__}; trained can be "
                    f"{', '.join(kind.__name__ for kind in TRAINABLE)}. Train before quantizing"
                )
            if isinstance(weight, LowRank):
                _factorize(model, name, weight)
            mask = mask_of(weight)
            if mask is not None:
                masks[f"{name}.weight"] = mask.to(device)
    model.requires_grad_(True)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.requires_grad_(embeddings)
    return Trainable(model, masks)


def _factorize(model: PreTrainedModel, name: str, weight: LowRank) -> None:
    """Puts two linears in place of one."""
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    device = old.weight.device
    down, up = (
        nn.Linear(f.shape[1], f.shape[0], bias=False, device="meta") for f in (weight.down, weight.up)
    )
    down.weight = nn.Parameter(weight.down.to(device, torch.float32))
    up.weight = nn.Parameter(weight.up.to(device, torch.float32))
    up.bias = old.bias
    model.set_submodule(name, nn.Sequential(down, up))


def write_trained(model: PreTrainedModel, before: State, after: StateWriter) -> None:
    """Writes the state of a trained model: the formats, patterns and dtypes are those of the state before."""
    tensors = model.state_dict()
    for index in range(before.num_layers):
        prefix = f"{before.meta_model.prefix}{index}."
        after.write_layer(index, _renewed(before.layer(index), tensors, prefix))
    outer = before.outer()
    after.write_outer(_renewed(outer, tensors, ""))
    after.write_config(before.config)


def _renewed(part: Part, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor | Weight]:
    return {name: _renew(value, tensors, f"{prefix}{name}") for name, value in part.items()}


def _renew(value: Tensor | Weight, tensors: dict[str, Tensor], name: str) -> Tensor | Weight:
    """The values of a module or parameter of this name in place of others."""
    if isinstance(value, LowRank):
        dtype = value.down.dtype
        down, up = (tensors[f"{name}.{factor}.weight"].to("cpu", dtype) for factor in (DOWN, UP))
        return LowRank(down, up)
    if isinstance(value, Weight):
        return repack(value, tensors[f"{name}.weight"].cpu()) if isinstance(value, TRAINABLE) else value
    return tensors[name].to("cpu", value.dtype) if name in tensors else value
