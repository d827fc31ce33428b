"""The base class of steps that train: the losses, the loop, the curve.

Hidden states and attention maps may be learnt from beside logits, as in TinyBERT (Jiao et al., arXiv
1909.10351).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import torch
from msgspec import Meta
from transformers import PretrainedConfig, PreTrainedModel

from fastserve.compression.errors import RecipeError
from fastserve.compression.state.model_state import State, StateWriter
from fastserve.compression.step import Context
from fastserve.compression.training.losses import Divergence, LogitLoss
from fastserve.compression.training.objective import FeatureWeights, Objective, compute_dtype
from fastserve.compression.training.trainable import trainable, write_trained
from fastserve.compression.training.trainer import Trainer
from fastserve.compression.training.training_plan import TrainingPlan


class TrainingStep(TrainingPlan, frozen=True, kw_only=True):
    """A step that trains: by which plan, towards what."""

    embeddings: Annotated[bool, Meta(description="whether embedding and head train too")] = False
    next_token: Annotated[float, Meta(ge=0, description="weight of the next token's loss")] = 0.5
    distillation: Annotated[float, Meta(ge=0, description="weight of the divergence from the teacher")] = 1.0
    hidden_states: Annotated[float, Meta(ge=0, description="weight of the hidden states' loss")] = 6.0
    attention: Annotated[float, Meta(ge=0, description="weight of the attention maps' loss")] = 0.0
    divergence: Divergence = "forward"
    temperature: Annotated[float, Meta(gt=0)] = 1.0
    skew: Annotated[float, Meta(gt=0, lt=1, description="skew of the skewed divergences")] = 0.1

    def check(self, config: PretrainedConfig) -> None:
        """Raises RecipeError for a budget that is not one, and if no loss has a weight."""
        super().check(config)
        if not any(self.weights_of_losses().values()):
            names = ", ".join(self.weights_of_losses())
            raise RecipeError(f"{names}: got 0 for each; allowed: at least one above 0")

    def weights_of_losses(self) -> dict[str, float]:
        """The weights of the losses by the name of the field."""
        names = ("next_token", "distillation", "hidden_states", "attention")
        return {name: getattr(self, name) for name in names}

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
        training = Trainer(
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
