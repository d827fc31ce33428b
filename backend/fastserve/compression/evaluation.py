"""How good a model is: its perplexity on fixed windows of text, and how near it stays to another model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from fastserve.models.causal_lm import CausalLM
from fastserve.models.kv_cache import make_kv_caches
from fastserve_kernels.attention_metadata import AttentionMetadata

BLOCK_SIZE = 16
LOGITS_AT_ONCE = 1 << 23
"""Elements of a chunk of logits, 32 MiB in float32: whole windows of a large vocabulary would fill memory."""


@dataclass(frozen=True)
class Quality:
    """Of a model, over all predicted tokens of the windows."""

    perplexity: float
    """exp of the mean negative log likelihood of each token given those before it in its window."""
    kl: float | None
    """Mean of KL(reference || model) of the next token's distribution, in nats; None: no reference."""
    top1_agreement: float | None
    """Share of tokens where both models think the same token the likeliest; None: no reference."""
    tokens: int
    """Predicted: the first of each window is not."""


class WholeSequences:
    """Runs a model over whole sequences, one at a time, in a cache of its own."""

    def __init__(self, model: CausalLM, max_length: int) -> None:
        """Raises ValueError if the model does not serve sequences of `max_length` tokens."""
        if max_length > model.max_position:
            raise ValueError(
                f"length: got {max_length}; allowed for this model: at most {model.max_position}"
            )
        self.model = model
        self._blocks = list(range(-(-max_length // BLOCK_SIZE)))
        shapes = model.kv_cache_shapes(len(self._blocks), BLOCK_SIZE)
        self._caches = make_kv_caches(shapes, model.dtype, model.device)

    @torch.inference_mode()
    def hidden(self, token_ids: Tensor) -> Tensor:
        """What `logits` of the model wants of each token of token_ids [T] int64, [T, hidden]."""
        count = len(token_ids)
        metadata = AttentionMetadata.build([count], [count], [self._blocks], BLOCK_SIZE, self.model.device)
        return self.model.forward(token_ids.to(self.model.device), metadata, self._caches)


def evaluate(
    model: CausalLM, reference: CausalLM | None, windows: Tensor, progress: Progress | None = None
) -> Quality:
    """Judges a model by windows [samples, length] int64, and beside a reference of the same vocabulary.

    Both compute in the dtype they were loaded with; float32 is meant. Raises ValueError if the windows are
    longer than a model serves, or the vocabularies differ.
    """
    if reference is not None and reference.vocab_size != model.vocab_size:
        raise ValueError(
            f"reference: its vocabulary has {reference.vocab_size} tokens, not {model.vocab_size}"
        )
    samples, length = windows.shape
    sequences = WholeSequences(model, length)
    reference_sequences = None if reference is None else WholeSequences(reference, length)
    task = progress.add_task("evaluate", total=samples) if progress else None
    loss, kl, agreed = 0.0, 0.0, 0
    for window in windows:
        hidden = sequences.hidden(window)
        reference_hidden = None if reference_sequences is None else reference_sequences.hidden(window)
        for rows in _chunks(length - 1, model.vocab_size):
            log_q = log_probabilities(model, hidden[rows])
            targets = window[1:][rows].to(log_q.device)
            loss += float(F.nll_loss(log_q, targets, reduction="sum"))
            if reference is not None and reference_hidden is not None:
                log_p = log_probabilities(reference, reference_hidden[rows]).to(log_q.device)
                kl += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
                agreed += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
        if progress and task is not None:
            progress.advance(task)
    tokens = samples * (length - 1)
    if reference is None:
        return Quality(math.exp(loss / tokens), None, None, tokens)
    return Quality(math.exp(loss / tokens), kl / tokens, agreed / tokens, tokens)


def log_probabilities(model: CausalLM, hidden: Tensor) -> Tensor:
    """Of every token that may follow each row of hidden [n, hidden]: [n, vocab] float32."""
    return model.logits(hidden).log_softmax(-1)


def _chunks(count: int, vocab_size: int) -> Iterator[slice]:
    """Slices of `count` rows so short that their logits are LOGITS_AT_ONCE at most."""
    rows = max(1, LOGITS_AT_ONCE // vocab_size)
    for first in range(0, count, rows):
        yield slice(first, min(first + rows, count))
