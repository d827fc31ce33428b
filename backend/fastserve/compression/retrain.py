"""Recovery after pruning or decomposing: what is left of the model is trained, and masks are held.

It learns from what the source model expects of each next token, which says more than the token that came.
"""

from __future__ import annotations

from fastserve.compression.state import State, StateWriter
from fastserve.compression.step import Context
from fastserve.compression.training_step import TrainingStep


class Retrain(TrainingStep, frozen=True, kw_only=True, tag="retrain"):
    """Trains all linears and norms. A pruned linear keeps its pattern, one of low rank its rank."""

    def run(self, before: State, after: StateWriter, context: Context) -> None:
        self.train(before, context.source, after, context, self.embeddings)
