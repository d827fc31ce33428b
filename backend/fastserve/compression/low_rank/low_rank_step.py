"""Low-rank decomposition with whitening: a weight W [N, K] becomes up [N, R] times down [R, K].

Truncated singular values lose least of the weight. What counts are its outputs, and inputs have few
directions: with E[x x^T] = L L^T (Cholesky) the singular values of W L are what outputs are made of
(SVD-LLM, Wang et al., arXiv 2403.07378). With U the first left singular vectors, U U^T W is the product
whose outputs are nearest; it equals their truncation times L^-1, which need not be computed. An output
counts by how much the model's predictions change with it (`sensitivity`), and so the errors of all linears
are one sum, by which the ranks are chosen (`ranks`).

The update fits to the inputs x of the compressed model the outputs W x' of the model before. The weight of
least squares is W E[x' x^T] E[x x^T]^-1, and the nearest of a rank is its truncation as above (reduced-rank
regression, Izenman 1975): up and down need not take turns.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from msgspec import Meta
from torch import Tensor
from transformers import PretrainedConfig

from fastserve.compression.calibration.importance import measure_importance
from fastserve.compression.calibration.layer import Layer, Moments
from fastserve.compression.calibration.layer_step import LayerStep, run_layers
from fastserve.compression.calibration.regression import Regression
from fastserve.compression.calibration.sensitivity import Sensitivity
from fastserve.compression.errors import RecipeError
from fastserve.compression.low_rank.ranks import Options, ranks_for_error, ranks_for_size
from fastserve.compression.state.model_state import State, StateWriter, read_notes
from fastserve.compression.step import Context, WeightKind
from fastserve_kernels.formats import Dense, LowRank, Weight

LEAST = 1e-3
"""Least importance of an output, relative to the mean of a linear's."""


class LowRankStep(LayerStep, frozen=True, kw_only=True, tag="low_rank"):
    """Writes weights as products of two thin matrices."""

    parameters: (
        Annotated[float, Meta(gt=0, lt=1, description="part of the targets' to keep, at most")] | None
    ) = None
    error: (
        Annotated[float, Meta(gt=0, lt=1, description="largest relative error of each target's outputs")]
        | None
    ) = None
    weights: Annotated[
        Literal["whitened", "svd"], Meta(description="nearest by their outputs, or by themselves")
    ] = "whitened"
    update: Annotated[
        bool, Meta(description="whether linears make up for what the layers before them lost")
    ] = True
    multiple: Annotated[int, Meta(ge=1, description="what ranks are multiples of")] = 16

    accepts: ClassVar[frozenset[WeightKind]] = frozenset(("dense",))
    produces: ClassVar[WeightKind | None] = "low rank"

    def check(self, config: PretrainedConfig) -> None:
        """Raises RecipeError unless either `parameters` or `error` is given."""
        if (self.parameters is None) == (self.error is None):
            raise RecipeError(
                f"parameters, error: got {self.parameters} and {self.error}; allowed: one of the two"
            )

    def dummy_output(self, weight: Weight, dtype: torch.dtype) -> Weight | None:
        """Zeros of the rank that keeps the share of `parameters`; None if ranks follow from `error`."""
        if self.parameters is None:
            return None
        rows, columns = weight.out_features, weight.in_features
        rank = round(self.parameters * rows * columns / (rows + columns))
        return LowRank(torch.zeros(rank, columns, dtype=dtype), torch.zeros(rows, rank, dtype=dtype))

    def run(self, before: State, after: StateWriter, context: Context) -> None:
        """Chooses the ranks, then truncates layer by layer."""
        self._survey(before, after, context)
        truncation = _Truncation(
            targets=self.targets,
            ranks=read_notes(after.directory)["ranks"],
            whitened=self.weights == "whitened",
            update=self.update,
        )
        run_layers(truncation, before, after, context)

    def _survey(self, before: State, after: StateWriter, context: Context) -> None:
        """Chooses the rank of each linear and notes them."""
        options: dict[str, Options] = {}

        def on_layer(index: int, found: dict[str, Sensitivity]) -> None:
            for local, linear in before.linears(index).items():
                name = f"{before.meta_model.prefix}{index}.{local}"
                if self.selects(name):
                    options[name] = self._options(linear, found.get(local), context)
            if index == 0:
                after.note("ranks", self._ranks(options))

        if self.weights == "whitened":
            measure_importance(before, after, context, on_layer)
        elif "ranks" not in read_notes(after.directory):
            for index in reversed(range(before.num_layers)):
                on_layer(index, {})

    def _ranks(self, options: dict[str, Options]) -> dict[str, int]:
        if self.parameters is not None:
            return ranks_for_size(options, self.parameters)
        assert self.error is not None
        return ranks_for_error(options, self.error)

    def _options(self, linear: Weight, found: Sensitivity | None, context: Context) -> Options:
        """The ranks a linear may have; errors are the divergence of predictions, or relative ones of the
        weight."""
        weight = linear.dequantize().to(context.device)
        if found is None:
            squares = squared_singular_values(weight, None, None)
            squares = squares / squares.sum()
        else:
            inputs = Regression.towards(
                weight, weight @ found.hessian, found.hessian, context.calibration.numel()
            )
            squares = squared_singular_values(weight, inputs.damped_hessian(inputs.ridge), found.rows / 2)
        return Options.of((linear.out_features, linear.in_features), squares.cpu(), self.multiple)


class _Truncation(LayerStep, frozen=True, kw_only=True, tag="low_rank"):
    """Gives each linear the rank that was chosen for it."""

    ranks: dict[str, int]
    """The rank of each linear by full name; 0: it stays dense."""
    whitened: bool
    update: bool

    @property
    def with_reference(self) -> bool:  # type: ignore[override]
        return self.update

    @property
    def weights_tokens(self) -> bool:  # type: ignore[override]
        return self.whitened

    def compress(self, layer: Layer, names: tuple[str, ...]) -> None:
        for name in layer.in_order(names):
            rank = self.ranks[f"{layer.prefix}{name}"]
            if rank > 0 or self.update:
                layer.replace(name, self._weight(layer, name, rank, layer.moments(name)))

    def _weight(self, layer: Layer, name: str, rank: int, moments: Moments) -> Weight:
        weight = layer.dense(name)
        wanted = moments.hessian if moments.drift is None else moments.hessian + moments.drift
        found = Regression.towards(weight, weight @ wanted, moments.hessian, moments.tokens)
        best = found.solve_all() if self.update else weight
        if rank == 0:
            return Dense(best.to(layer.dtype))
        hessian = found.damped_hessian(found.ridge) if self.whitened else None
        down, up = truncate(best, hessian, layer.output_weights(name) if self.whitened else None, rank)
        return LowRank(down.to(layer.dtype), up.to(layer.dtype))


def squared_singular_values(weight: Tensor, hessian: Tensor | None, counts: Tensor | None) -> Tensor:
    """The squared singular values [min(N, K)] float64 of D W L, largest first.

    L L^T is the Hessian [K, K], D^2 the diagonal matrix of the importance of each output [N]; None stands for
    the identity.
    """
    product = _scales(weight, counts) * _whitened(weight, hessian)
    smaller = product @ product.T if len(product) < product.shape[1] else product.T @ product
    return torch.linalg.eigvalsh(smaller).flip(0).clamp_min(0)


def truncate(
    weight: Tensor, hessian: Tensor | None, counts: Tensor | None, rank: int
) -> tuple[Tensor, Tensor]:
    """down [R, K] and up [N, R], float32, with the least ||D (X - W) L|| of all products X of this rank."""
    scales = _scales(weight, counts)
    product = scales * _whitened(weight, hessian)
    if len(product) < product.shape[1]:
        left = torch.linalg.eigh(product @ product.T).eigenvectors.flip(1)[:, :rank]
    else:
        right = torch.linalg.eigh(product.T @ product).eigenvectors.flip(1)[:, :rank]
        left = torch.linalg.qr(product @ right).Q
    down, up = left.T @ (scales * weight.double()), left / scales
    return down.float(), up.float()


def _whitened(weight: Tensor, hessian: Tensor | None) -> Tensor:
    return weight.double() if hessian is None else weight.double() @ torch.linalg.cholesky(hessian.double())


def _scales(weight: Tensor, counts: Tensor | None) -> Tensor:
    """[N, 1] float64."""
    if counts is None:
        return torch.ones(len(weight), 1, dtype=torch.float64, device=weight.device)
    counts = counts.double()
    return counts.clamp_min(LEAST * counts.mean()).sqrt()[:, None]
