"""Fisher information: how much a model's predictions change with a linear's weight, to second order.

A change D of a weight changes the output of its linear by D x, and the divergence KL(p || p') of the model's
predictions by (g . D x)^2 / 2 per token, in expectation over labels drawn from p, with g the gradient of
their log-probability (the Fisher information). A token's |g|^2 may depend on its x: the first of a text has
the largest inputs, and for most linears hardly any gradient. So inputs are weighted by it, and the rest is
taken apart row by row: E[g_n^2] / 2 times the output error E[(D x)_n^2 |g|^2] / E[|g|^2].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastserve import heap
from fastserve.compression.calibration.layer_forward import LayerForward
from fastserve.compression.state.meta_model import EMBEDDING, HEAD, NORM, MetaModel
from fastserve.compression.state.model_state import State, dense, save_tensors

LEAST = 1e-30
"""Added to |g|^2, so that a linear that nothing depends on has a Hessian too."""


@dataclass(frozen=True)
class Sensitivity:
    """Fisher information of a linear: means over tokens."""

    hessian: Tensor
    """[K, K] E[x x^T |g|^2] / E[|g|^2] of its inputs."""
    rows: Tensor
    """[N] E[g_n^2] of its outputs."""
    tokens: Tensor
    """[samples, T] |g|^2 of each token."""


def sensitivities(
    state: State, token_ids: Tensor, device: torch.device, seed: int, scratch: Path
) -> Iterator[tuple[int, dict[str, Sensitivity]]]:
    """Yields each layer's index and the sensitivity of its linears by local name, the last layer first, on
    windows of text [samples, T].

    One layer at a time is in memory; the hidden states before each wait in files in the directory `scratch`.
    """
    meta_model = MetaModel(state.config, device)
    outer = {name: tensor.to(device) for name, tensor in dense(state.outer()).items()}
    hidden, calls = meta_model.embed(outer[f"{EMBEDDING}.weight"], token_ids)
    files = [scratch / f"states-{index:04d}.safetensors" for index in range(state.num_layers)]
    for index, file in enumerate(files):
        save_tensors({"hidden": hidden}, file, {})
        layer = LayerForward(meta_model.materialize(index, state.dense_layer(index)), calls[index])
        with torch.no_grad():
            for sequence in hidden.split(1):
                sequence.copy_(layer(sequence))
    _head_backward(meta_model, outer, hidden, seed)
    gradients = hidden
    del outer
    for index, file in reversed(list(enumerate(files))):
        layer = LayerForward(meta_model.materialize(index, state.dense_layer(index)), calls[index])
        entering = load_file(file, str(device))["hidden"]
        file.unlink()
        heap.trim()
        yield index, _layer_sensitivities(layer, meta_model.linears(index), entering, gradients)


@torch.enable_grad()
def _head_backward(meta_model: MetaModel, outer: dict[str, Tensor], hidden: Tensor, seed: int) -> None:
    """Replaces the last hidden states [samples, T, hidden] by the gradients of the log-probabilities of drawn
    labels by them."""
    model = meta_model.model
    norm = copy.deepcopy(model.get_decoder().norm).to_empty(device=hidden.device)
    prefix = f"{NORM}."
    norm.load_state_dict({n.removeprefix(prefix): t for n, t in outer.items() if n.startswith(prefix)})
    head = outer.get(f"{HEAD}.weight", outer[f"{EMBEDDING}.weight"])
    generator = torch.Generator(hidden.device).manual_seed(seed)
    for sequence in hidden:
        leaf = sequence.detach().requires_grad_()
        normed = norm(leaf)
        with torch.no_grad():
            probabilities = (normed @ head.T).softmax(-1)
            labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            # By the logits, log p of a label has the gradient 1 there, and -p everywhere.
            gradient_of_normed = head[labels] - probabilities @ head
        normed.backward(gradient_of_normed)
        assert leaf.grad is not None
        sequence.copy_(leaf.grad)


@torch.enable_grad()
def _layer_sensitivities(
    layer: LayerForward, names: tuple[str, ...], hidden: Tensor, gradients: Tensor
) -> dict[str, Sensitivity]:
    """Sensitivities of a layer's linears by local name, given the gradients [samples, T, hidden] by its
    output, which are replaced by those by its input."""
    # What is kept is written in place: small tensors that stay, made between large ones that go, would leave
    # holes that nothing large fits into.
    hessians: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    tokens = {name: gradients.new_empty(gradients.shape[:2]) for name in names}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def note(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            x = given[0].detach().flatten(0, -2)
            out.register_hook(lambda gradient: add(x, gradient.flatten(0, -2)))

        def add(x: Tensor, gradient: Tensor) -> None:
            squares = gradient.square().sum(-1) + LEAST
            weighted = x * squares.sqrt()[:, None]
            hessians[name] = _added(hessians.get(name), weighted.T @ weighted)
            rows[name] = _added(rows.get(name), gradient.square().sum(0))
            tokens[name][number].copy_(squares)

        return note

    hooks = [layer.module.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    for number in range(len(hidden)):
        sequence, gradient = hidden[number, None], gradients[number, None]
        leaf = sequence.detach().requires_grad_()
        layer(leaf).backward(gradient)
        assert leaf.grad is not None
        gradient.copy_(leaf.grad)
    for hook in hooks:
        hook.remove()
    return {name: _sensitivity(hessians[name], rows[name], tokens[name]) for name in names}


def _added(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)


def _sensitivity(hessian: Tensor, rows: Tensor, tokens: Tensor) -> Sensitivity:
    """A sensitivity from sums over tokens."""
    return Sensitivity(hessian / tokens.sum(), rows / tokens.numel(), tokens)
