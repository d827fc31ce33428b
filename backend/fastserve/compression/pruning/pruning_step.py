"""The base classes of steps that prune linears: the pattern, the sparsity, the reconstruction."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from msgspec import Meta
from torch import Tensor
from transformers import PretrainedConfig

from fastserve.compression.calibration.hessian import Damping, Drift, damped, drift_corrected
from fastserve.compression.calibration.layer import Layer, Moments
from fastserve.compression.calibration.layer_step import LayerStep
from fastserve.compression.errors import RecipeError
from fastserve.compression.pruning.reconstruction import reconstruct
from fastserve.compression.sparsity_patterns import (
    ROWS,
    Pattern,
    PatternName,
    TwoOfFour,
    parse_pattern,
)
from fastserve.compression.state.meta_model import MetaModel
from fastserve.compression.step import WeightKind
from fastserve_kernels.formats import Weight

Sparsity = Annotated[float, Meta(gt=0, lt=1, description="share of the weights left out")]


class PruningStep(LayerStep, frozen=True, kw_only=True):
    """Leaves out weights of each linear by itself, after those that run before it."""

    accepts: ClassVar[frozenset[WeightKind]] = frozenset(("dense", "sparse"))
    produces: ClassVar[WeightKind] = "sparse"

    pattern: PatternName = "unstructured"

    @property
    def target_sparsity(self) -> float | None:
        """The share of the weights that the step leaves out; None: only the run can tell."""
        raise NotImplementedError

    def dummy_output(self, weight: Weight, dtype: torch.dtype) -> Weight | None:
        """A weight of the target sparsity in the format of the pattern; None if the sparsity is unknown."""
        if self.target_sparsity is None:
            return None
        dense, pattern = weight.dequantize(), parse_pattern(self.pattern)
        return pattern.pack(dense.to(dtype), pattern.mask(dense.abs(), self.target_sparsity))

    def prune(self, weight: Tensor, moments: Moments, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """The weight [N, K] float32 after pruning, and a mask [N, K] bool, true where it is kept."""
        raise NotImplementedError

    def compress(self, layer: Layer, names: tuple[str, ...]) -> None:
        """Prunes the linears of these names, in the order in which they run."""
        pattern = parse_pattern(self.pattern)
        for name in layer.in_order(names):
            weight, mask = self.prune(layer.dense(name), layer.moments(name), pattern)
            layer.replace(name, pattern.pack(weight.to(layer.dtype), mask))

    def check(self, config: PretrainedConfig) -> None:
        """Raises RecipeError if the pattern does not divide a targeted linear."""
        meta_model = MetaModel.of(config)
        for index in range(meta_model.num_layers):
            for name in meta_model.linears(index):
                full_name = f"{meta_model.prefix}{index}.{name}"
                if self.selects(full_name):
                    self._check_shape(full_name, meta_model.layers[index].get_submodule(name).weight)

    def _check_shape(self, name: str, weight: object) -> None:
        assert isinstance(weight, Tensor)
        try:
            parse_pattern(self.pattern).check(tuple(weight.shape))
        except ValueError as error:
            raise RecipeError(f"pattern: got {self.pattern!r}, but of {name} {error}") from error

    def check_two_of_four(self, field: str, value: object, allowed: object) -> None:
        """Raises RecipeError if a field asks for anything else than what 2:4 is by itself."""
        if parse_pattern(self.pattern) == TwoOfFour() and value != allowed:
            raise RecipeError(f"{field}: got {value!r}; allowed with the pattern 2:4: {allowed!r}")


class SparsityStep(PruningStep, frozen=True, kw_only=True):
    """A step that is told how many weights to leave out."""

    sparsity: Sparsity = 0.5

    @property
    def target_sparsity(self) -> float:
        """The sparsity of the recipe."""
        return self.sparsity

    def check(self, config: PretrainedConfig) -> None:
        """Raises RecipeError for a pattern that does not fit, or 2:4 with another sparsity than 0.5."""
        super().check(config)
        self.check_two_of_four("sparsity", self.sparsity, 0.5)


class ReconstructingStep(SparsityStep, frozen=True, kw_only=True):
    """A step after which the weights that are kept make up for the others, and for the layers before them."""

    weights_tokens: ClassVar[bool] = True

    damping: Damping = 0.01
    drift: Drift = 0.5

    @property
    def with_reference(self) -> bool:  # type: ignore[override]
        """Whether `drift` is made up for."""
        return self.drift > 0

    def mask(self, weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
        """A mask [N, K] bool, true where a weight [N, K] is kept, given the Hessian [K, K] of its inputs."""
        raise NotImplementedError

    def prune(self, weight: Tensor, moments: Moments, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """Chooses the mask for the drift-corrected weight, and solves what is kept by least squares."""
        hessian = damped(moments.hessian, self.damping)
        if moments.drift is not None:
            weight = drift_corrected(weight, hessian, moments.drift, self.drift)
        mask = self.mask(weight, hessian, pattern)
        return reconstruct(weight, hessian, mask), mask

    def check(self, config: PretrainedConfig) -> None:
        """Raises RecipeError for a pattern or sparsity that does not fit, and for whole rows."""
        super().check(config)
        if parse_pattern(self.pattern) == ROWS:
            raise RecipeError(
                "pattern: got 'rows'; allowed with magnitude and wanda alone: a row keeps no weight that "
                "could make up for the others"
            )
