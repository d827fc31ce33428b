"""Pruning by magnitude alone: no calibration text is looked at."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor
from transformers import PretrainedConfig

from fastserve.compression.calibration.layer import Moments
from fastserve.compression.errors import RecipeError
from fastserve.compression.pruning.pruning_step import PruningStep, Sparsity
from fastserve.compression.sparsity_patterns import BlockPattern, Pattern, parse_pattern
from fastserve.compression.state.model_state import State, StateWriter
from fastserve.compression.step import Context

DROPPED_BITS = 10
"""Low bits of a float32 that a histogram of magnitudes ignores: a bin is as wide as 1/8192 of its numbers."""
BINS = 1 << (31 - DROPPED_BITS)


class Magnitude(PruningStep, frozen=True, kw_only=True, tag="magnitude"):
    """Leaves out the weights of least magnitude; the blocks or rows of least L1 norm."""

    sparsity: Sparsity | None = None
    """Share of the weights left out; None: a half, unless there is a threshold."""
    threshold: (
        Annotated[float, Meta(gt=0, description="least magnitude that stays; of a block, the mean")] | None
    ) = None
    over: Annotated[
        Literal["row", "matrix", "model"], Meta(description="what the sparsity is a share of")
    ] = "matrix"
    """`model`: all targeted linears together, so that some are pruned more than others."""

    @property
    def measures(self) -> bool:
        """False: magnitudes need no activation statistics."""
        return False

    @property
    def target_sparsity(self) -> float | None:
        """The sparsity; None with a threshold."""
        return None if self.threshold is not None else self.sparsity or 0.5

    def check(self, config: PretrainedConfig) -> None:
        """Raises RecipeError for a threshold beside a sparsity or `over`, and for what 2:4 does not take."""
        super().check(config)
        if self.sparsity is not None and self.threshold is not None:
            raise RecipeError(f"threshold: got {self.threshold} beside a sparsity; allowed: one of the two")
        if self.threshold is not None and self.over != "matrix":
            raise RecipeError(f"over: got {self.over!r}; a threshold is over nothing, so leave it out")
        self.check_two_of_four("sparsity", self.sparsity or 0.5, 0.5)
        self.check_two_of_four("threshold", self.threshold, None)
        self.check_two_of_four("over", self.over, "matrix")

    def run(self, before: State, after: StateWriter, context: Context) -> None:
        """Prunes layer by layer; over the whole model by the threshold that gives it the sparsity."""
        if self.over == "model":
            threshold = self._threshold_of(before)
            msgspec.structs.replace(self, over="matrix", threshold=threshold).run(before, after, context)
        else:
            super().run(before, after, context)

    def prune(self, weight: Tensor, moments: Moments, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """Leaves out what is below the threshold, or the share of least magnitude."""
        costs = weight.abs()
        if self.threshold is not None:
            assert isinstance(pattern, BlockPattern)
            mask = pattern.expand_blocks(pattern.block_means(costs) >= self.threshold, weight.shape[1])
        else:
            assert self.over != "model"
            mask = pattern.mask(costs, self.sparsity or 0.5, self.over)
        return weight * mask, mask

    def _threshold_of(self, state: State) -> float:
        """The magnitude below which the sparsity's share of all targeted weights lies."""
        pattern = parse_pattern(self.pattern)
        assert isinstance(pattern, BlockPattern)
        counts = torch.zeros(BINS, dtype=torch.int64)
        for index in range(state.num_layers):
            for name, weight in state.linears(index).items():
                if self.selects(f"{state.meta_model.prefix}{index}.{name}"):
                    counts += weight_histogram(weight.dequantize(), pattern)
        return quantile(counts, self.sparsity or 0.5)


def weight_histogram(weight: Tensor, pattern: BlockPattern) -> Tensor:
    """The number [BINS] int64 of weights in blocks whose mean magnitude lies in each bin, of a weight [N,
    K]."""
    norms = pattern.block_means(weight.abs())
    of_a_tile = weight.numel() // norms.numel()
    bits = norms.contiguous().view(torch.int32) >> DROPPED_BITS
    return of_a_tile * torch.bincount(bits.flatten(), minlength=BINS).cpu()


def quantile(counts: Tensor, share: float) -> float:
    """The end of the first bin of a `weight_histogram` by which this share of the weights is counted."""
    last = int(torch.searchsorted(counts.cumsum(0), round(share * int(counts.sum()))))
    return float(torch.tensor(last + 1 << DROPPED_BITS, dtype=torch.int32).view(torch.float32))
