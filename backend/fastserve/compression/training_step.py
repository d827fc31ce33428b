"""What steps that train have in common: the budget, the losses, the loop, the curve.

Hidden states and attention maps may be learnt from beside logits, as in TinyBERT (Jiao et al., arXiv
1909.10351).
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Annotated

import torch
from msgspec import Meta
from transformers import PretrainedConfig, PreTrainedModel

from fastserve.compression.losses import Divergence, LogitLoss
from fastserve.compression.objective import FeatureWeights, Objective, compute_dtype
from fastserve.compression.state import State, StateWriter
from fastserve.compression.step import Context, RecipeError, Step
from fastserve.compression.trainable import trainable, write_trained
from fastserve.compression.training import Training


class TrainingStep(Step, frozen=True, kw_only=True):
    """A step that trains: for how long, how fast, towards what."""

    minutes: Annotated[float, Meta(gt=0, description="of processor time, of all cores together")] | None = (
        None
    )
    steps: Annotated[int, Meta(ge=1, description="of the optimiser; in place of minutes")] | None = None
    learning_rate: Annotated[float, Meta(gt=0, description="at its highest")] = 3e-4
    warm_up: Annotated[float, Meta(ge=0, lt=1, description="share of the budget; then cosine to 0")] = 0.1
    batch: Annotated[int, Meta(ge=1, description="windows of a step")] = 2
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    clip: Annotated[float, Meta(gt=0, description="largest norm of the gradient")] = 1.0
    evaluations: Annotated[int, Meta(ge=1, description="on held-out text")] = 4
    patience: Annotated[int, Meta(ge=1, description="evaluations without improvement before it ends")] = 3
    embeddings: Annotated[bool, Meta(description="whether embedding and head train too")] = False
    next_token: Annotated[float, Meta(ge=0, description="weight of the next token's loss")] = 0.5
    distillation: Annotated[float, Meta(ge=0, description="weight of the divergence from the teacher")] = 1.0
    hidden_states: Annotated[float, Meta(ge=0, description="weight of the hidden states' loss")] = 6.0
    attention: Annotated[float, Meta(ge=0, description="weight of the attention maps' loss")] = 0.0
    divergence: Divergence = "forward"
    temperature: Annotated[float, Meta(gt=0)] = 1.0
    skew: Annotated[float, Meta(gt=0, lt=1, description="of the skewed divergences")] = 0.1

    def check(self, config: PretrainedConfig) -> None:
        if (self.minutes is None) == (self.steps is None):
            came = "neither" if self.steps is None else "both"
            raise RecipeError(f"minutes, steps: got {came}; allowed: one of them, which is the budget")
        if not any(self.weights_of_losses().values()):
            names = ", ".join(self.weights_of_losses())
            raise RecipeError(f"{names}: got 0 for each; allowed: at least one above 0")

    def weights_of_losses(self) -> dict[str, float]:
        """By the name of the field."""
        names = ("next_token", "distillation", "hidden_states", "attention")
        return {name: getattr(self, name) for name in names}

    def rate(self, done: float) -> float:
        """The learning rate when this share of the budget is spent: it rises from a tenth and falls to 0."""
        if done < self.warm_up:
            return self.learning_rate * (0.1 + 0.9 * done / self.warm_up)
        return self.learning_rate * (1 + math.cos(math.pi * (done - self.warm_up) / (1 - self.warm_up))) / 2

    def train(
        self,
        student: State,
        teacher: State,
        after: StateWriter,
        context: Context,
        embeddings: bool,
    ) -> None:
        """Writes the student, trained, and notes the curve as `losses`."""
        model = trainable(student, context.device, embeddings)
        logit_loss = LogitLoss(
            self.next_token, self.distillation, self.divergence, self.temperature, self.skew
        )
        features = FeatureWeights(self.hidden_states, self.attention)
        needs_teacher = self.distillation or self.hidden_states or self.attention
        beside = frozen_model(teacher, context.device) if needs_teacher else None
        objective = Objective(model.model, beside, logit_loss, features)
        training = Training(
            self,
            model.parameters | dict(objective.projections.named_parameters(prefix="projections")),
            objective,
            after.directory,
            context.seed,
            model.mask_gradients,
        )
        curve = training.run(context.training, context.held_out, context.progress)
        after.note("losses", [asdict(point) for point in curve])
        write_trained(model.model, student, after)


def frozen_model(state: State, device: torch.device) -> PreTrainedModel:
    """A teacher, in the dtype in which it computes fastest."""
    model = state.transformers_model(compute_dtype(device), device)
    return model.requires_grad_(False)
