"""Evaluation of a model: its perplexity on fixed windows of text, and its divergence from another model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from fastserve import heap
from fastserve.checkpoints.kv_cache_scheme import KVScales
from fastserve.models.causal_lm import CausalLM
from fastserve.models.decoder import Decoder
from fastserve.models.kv_cache import make_kv_caches
from fastserve_kernels.attention_metadata import AttentionMetadata

BLOCK_SIZE = 16
TOKENS_AT_ONCE = 8192
"""Tokens whose hidden states wait for each other between two layers: a layer is read once for all of them."""
LOGITS_AT_ONCE = 1 << 21
"""Elements of a chunk of logits, 8 MiB in float32: whole windows of a large vocabulary would fill memory."""
KVCacheFormat = tuple[torch.dtype, list[KVScales] | None]
"""The dtype of a KV cache, and each layer's scales if that has 8 bits."""


@dataclass(frozen=True)
class Quality:
    """The quality of a model, over all predicted tokens of the windows."""

    perplexity: float
    """exp of the mean negative log likelihood of each token given those before it in its window."""
    kl: float | None
    """Mean of KL(reference || model) of the next token's distribution, in nats; None: no reference."""
    top1_agreement: float | None
    """Share of tokens where both models think the same token the likeliest; None: no reference."""
    tokens: int
    """Predicted: the first of each window is not."""
    reference_perplexity: float | None = None
    """The perplexity of the reference on the same tokens."""


class SequenceRunner:
    """Runs a model over whole sequences, in a cache of its own that has room for one."""

    def __init__(self, model: CausalLM, max_length: int, kv_cache: KVCacheFormat | None = None) -> None:
        """`kv_cache` None: in the model's dtype.

        Raises ValueError if the model does not serve sequences of `max_length` tokens.
        """
        if max_length > model.max_position:
            raise ValueError(
                f"length: got {max_length}; allowed for this model: at most {model.max_position}"
            )
        self.model = model
        self._blocks = list(range(-(-max_length // BLOCK_SIZE)))
        shapes = model.kv_cache_shapes(len(self._blocks), BLOCK_SIZE)
        dtype, scales = (model.dtype, None) if kv_cache is None else kv_cache
        self._caches = make_kv_caches(shapes, dtype, model.device, scales)

    @torch.inference_mode()
    def hidden(self, sequences: Tensor) -> list[Tensor]:
        """The final hidden states [T, hidden] of each of the sequences [samples, T] int64, as the model's
        `logits` takes them."""
        count = sequences.shape[1]
        metadata = AttentionMetadata.build([count], [count], [self._blocks], BLOCK_SIZE, self.model.device)
        token_ids = sequences.to(self.model.device).unbind()
        if isinstance(self.model, Decoder):
            return self.model.forward_layerwise(token_ids, [metadata] * len(token_ids), self._caches)
        return [self.model.forward(ids, metadata, self._caches) for ids in token_ids]


def evaluate(
    model: CausalLM,
    reference: CausalLM | None,
    windows: Tensor,
    progress: Progress | None = None,
    kv_cache: KVCacheFormat | None = None,
) -> Quality:
    """Evaluates a model on windows [samples, length] int64, and beside a reference of the same vocabulary.

    Both compute in the dtype they were loaded with; float32 is meant. They may be loaded one layer at a time.
    `kv_cache`: of the model, not of the reference. Raises ValueError if the windows are longer than a model
    serves, or the vocabularies differ.
    """
    if reference is not None and reference.vocab_size != model.vocab_size:
        raise ValueError(
            f"reference: its vocabulary has {reference.vocab_size} tokens, not {model.vocab_size}"
        )
    samples, length = windows.shape
    sequences = SequenceRunner(model, length, kv_cache)
    reference_sequences = None if reference is None else SequenceRunner(reference, length)
    sums = _Sums()
    parts = windows.split(max(1, TOKENS_AT_ONCE // length))
    for part in (progress or Progress(disable=True)).track(parts, description="evaluate"):
        _evaluate_windows(part, sequences, reference_sequences, sums)
    return sums.quality(samples * (length - 1), reference is not None)


def _evaluate_windows(
    windows: Tensor, sequences: SequenceRunner, reference: SequenceRunner | None, sums: _Sums
) -> None:
    """Adds up what is found on windows that go through the layers together."""
    model, following = sequences.model, windows[:, 1:].flatten()
    hidden = _predicting(sequences, windows)
    reference_hidden = None if reference is None else _predicting(reference, windows)
    for rows in _chunks(len(following), model.vocab_size):
        targets = following[rows].to(model.device)
        log_q = log_probabilities(model, hidden[rows])
        sums.loss += float(F.nll_loss(log_q, targets, reduction="sum"))
        if reference is not None and reference_hidden is not None:
            log_p = log_probabilities(reference.model, reference_hidden[rows]).to(model.device)
            sums.add_reference(log_p, log_q, targets)


def _predicting(sequences: SequenceRunner, windows: Tensor) -> Tensor:
    """The hidden states [tokens, hidden] of all tokens but the windows' last ones."""
    predicting = torch.cat([hidden[:-1] for hidden in sequences.hidden(windows)])
    heap.trim()
    return predicting


@dataclass
class _Sums:
    """Sums over the tokens so far."""

    loss: float = 0.0
    reference_loss: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def add_reference(self, log_p: Tensor, log_q: Tensor, targets: Tensor) -> None:
        self.reference_loss += float(F.nll_loss(log_p, targets, reduction="sum"))
        self.kl += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
        self.agreed += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())

    def quality(self, tokens: int, has_reference: bool) -> Quality:
        perplexity = math.exp(self.loss / tokens)
        if not has_reference:
            return Quality(perplexity, None, None, tokens)
        reference_perplexity = math.exp(self.reference_loss / tokens)
        return Quality(perplexity, self.kl / tokens, self.agreed / tokens, tokens, reference_perplexity)


def log_probabilities(model: CausalLM, hidden: Tensor) -> Tensor:
    """The log-probabilities [n, vocab] float32 of the token that follows each row of hidden [n, hidden]."""
    return model.logits(hidden).log_softmax(-1)


def _chunks(count: int, vocab_size: int) -> Iterator[slice]:
    """Slices of `count` rows so short that their logits are LOGITS_AT_ONCE at most."""
    rows = max(1, LOGITS_AT_ONCE // vocab_size)
    for first in range(0, count, rows):
        yield slice(first, min(first + rows, count))
