"""Distillation: a smaller student learns what a teacher expects of the next token, and how it gets there.

The student is the model so far, which a structural step made smaller, or a fresh one of fewer layers, heads,
channels or a smaller width: it starts with rows, columns and layers picked evenly from the model so far
(as Xu et al. do, arXiv 2311.18823). Where the student is narrower, a matrix that is trained along and then
dropped maps its hidden states to the teacher's width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from msgspec import Meta
from transformers import PretrainedConfig

from fastserve.compression.errors import RecipeError
from fastserve.compression.state.model_state import State, StateWriter
from fastserve.compression.state.source_state import SourceState
from fastserve.compression.step import Context
from fastserve.compression.training.student_state import StudentSizes, StudentState
from fastserve.compression.training.training_step import TrainingStep


class Distill(TrainingStep, frozen=True, kw_only=True, tag="distill"):
    """Trains a student beside a teacher."""

    teacher: Annotated[str, Meta(description="a GGUF file or a directory; none: the source model")] | None = (
        None
    )
    student: StudentSizes | None = None
    """Sizes of a fresh student, whose embedding trains if it is narrower; None: the student is the model so
    far."""

    def check(self, config: PretrainedConfig) -> None:
        """Raises RecipeError for an impossible student, or a teacher of another vocabulary."""
        super().check(config)
        if self.student:
            self.student.config(config)
        if self.teacher:
            vocabulary = SourceState(Path(self.teacher)).config.vocab_size
            if vocabulary != config.vocab_size:
                raise RecipeError(
                    f"teacher: {self.teacher} has a vocabulary of {vocabulary} tokens; allowed: the model's, "
                    f"{config.vocab_size}"
                )

    def config_after(self, config: PretrainedConfig) -> PretrainedConfig:
        """The config of the student."""
        return self.student.config(config) if self.student else config

    def run(self, before: State, after: StateWriter, context: Context) -> None:
        """Makes the student, and trains it beside the teacher."""
        start = StudentState(before, self.student) if self.student else before
        teacher = SourceState(Path(self.teacher)) if self.teacher else context.source
        is_narrower = start.config.hidden_size < before.config.hidden_size
        self.train(start, teacher, after, context, self.embeddings or is_narrower)
