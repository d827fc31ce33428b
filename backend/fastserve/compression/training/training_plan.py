"""The training plan: budget, learning rate and batch."""

from __future__ import annotations

import math
from typing import Annotated

from msgspec import Meta
from transformers import PretrainedConfig

from fastserve.compression.errors import RecipeError
from fastserve.compression.step import Step


class TrainingPlan(Step, frozen=True, kw_only=True):
    """A budget, and how it is spent."""

    minutes: (
        Annotated[float, Meta(gt=0, description="minutes of processor time, of all cores together")] | None
    ) = None
    steps: Annotated[int, Meta(ge=1, description="optimizer steps; in place of minutes")] | None = None
    learning_rate: Annotated[float, Meta(gt=0, description="at its highest")] = 3e-4
    warm_up: Annotated[float, Meta(ge=0, lt=1, description="share of the budget; then cosine to 0")] = 0.1
    batch: Annotated[int, Meta(ge=1, description="windows of a step")] = 2
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    clip: Annotated[float, Meta(gt=0, description="largest norm of the gradient")] = 1.0
    evaluations: Annotated[int, Meta(ge=1, description="on held-out text")] = 4
    patience: Annotated[int, Meta(ge=1, description="evaluations without improvement before it ends")] = 3

    def check(self, config: PretrainedConfig) -> None:
        """Raises RecipeError unless either `minutes` or `steps` is given."""
        if (self.minutes is None) == (self.steps is None):
            came = "neither" if self.steps is None else "both"
            raise RecipeError(f"minutes, steps: got {came}; allowed: one of them, which is the budget")

    def rate(self, done: float) -> float:
        """The learning rate when this share of the budget is spent: it rises from a tenth and falls to 0."""
        if done < self.warm_up:
            return self.learning_rate * (0.1 + 0.9 * done / self.warm_up)
        return self.learning_rate * (1 + math.cos(math.pi * (done - self.warm_up) / (1 - self.warm_up))) / 2
