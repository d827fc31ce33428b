"""Recovery after pruning or decomposing: what is left of the model is trained, and masks are held.

It learns from the source model's hidden states and from what it expects of each next token, which say more
than the token that came; and a little from that token, which lowers perplexity further.
"""

from __future__ import annotations

from fastserve.compression.state.model_state import State, StateWriter
from fastserve.compression.step import Context
from fastserve.compression.training.training_step import TrainingStep


class Retrain(TrainingStep, frozen=True, kw_only=True, tag="retrain"):
    """Trains all linears and norms. A pruned linear keeps its pattern, one of low rank its rank."""

    def run(self, before: State, after: StateWriter, context: Context) -> None:
        """Trains the model so far beside the source model."""
        self.train(before, context.source, after, context, self.embeddings)
