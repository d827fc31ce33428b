"""What the steps that prune have in common."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta
from torch import Tensor
from transformers import PretrainedConfig

from fastserve.compression.layer import Layer, Moments
from fastserve.compression.patterns import PatternName, TwoOfFour, parse_pattern
from fastserve.compression.skeleton import Skeleton
from fastserve.compression.step import Kind, LayerStep, RecipeError

Sparsity = Annotated[float, Meta(gt=0, lt=1, description="share of the weights left out")]


class PruningStep(LayerStep, frozen=True, kw_only=True):
    """Leaves out weights of each linear by itself, the layers before it already pruned."""

    takes: ClassVar[frozenset[Kind]] = frozenset(("dense", "sparse"))
    leaves: ClassVar[Kind] = "sparse"

    pattern: PatternName = "unstructured"

    def prune(self, weight: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
        """The weight [N, K] float32 after pruning, and a mask [N, K] bool, true where it is kept."""
        raise NotImplementedError

    def compress(self, layer: Layer, names: tuple[str, ...]) -> None:
        pattern = parse_pattern(self.pattern)
        for name in sorted(names, key=lambda name: layer.stages.index(layer.stage_of(name))):
            weight, mask = self.prune(layer.dense(name), layer.moments(layer.stage_of(name)))
            layer.replace(name, pattern.pack(weight.to(layer.dtype), mask))

    def check(self, config: PretrainedConfig) -> None:
        skeleton = Skeleton.of(config)
        for index in range(skeleton.num_layers):
            for name in skeleton.linears(index):
                full_name = f"{skeleton.prefix}{index}.{name}"
                if self.selects(full_name):
                    self._check_shape(full_name, skeleton.layers[index].get_submodule(name).weight)

    def _check_shape(self, name: str, weight: object) -> None:
        assert isinstance(weight, Tensor)
        try:
            parse_pattern(self.pattern).check(tuple(weight.shape))
        except ValueError as error:
            raise RecipeError(f"pattern: got {self.pattern!r}, but of {name} {error}") from error


class SparsityStep(PruningStep, frozen=True, kw_only=True):
    """A step that is told how many weights to leave out."""

    sparsity: Sparsity = 0.5

    def check(self, config: PretrainedConfig) -> None:
        super().check(config)
        check_two_of_four(self.pattern, "sparsity", self.sparsity, 0.5)


def check_two_of_four(pattern: str, field: str, value: object, allowed: object) -> None:
    """Raises RecipeError if a field asks for anything else than what 2:4 is by itself."""
    if isinstance(parse_pattern(pattern), TwoOfFour) and value != allowed:
        raise RecipeError(f"{field}: got {value!r}; allowed with the pattern 2:4: {allowed!r}")
