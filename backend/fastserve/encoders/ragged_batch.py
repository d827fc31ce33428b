"""A batch of sequences of any lengths, one after the other: there is no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSequence:
    """A text, or a pair of texts, as a model reads it."""

    token_ids: list[int]
    token_type_ids: list[int] | None = None
    """0 for tokens of the first text, 1 for those of the second; None: the model is not told."""

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, eq=False)
class RaggedBatch:
    """B sequences with T tokens in all."""

    token_ids: Tensor
    """[T] int64."""
    token_type_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64: where each token stands in its sequence, from 0."""
    cu_seqlens: Tensor
    """[B + 1] int64: the tokens of sequence i are rows cu_seqlens[i] to cu_seqlens[i + 1]."""
    lengths: list[int]
    """Of the sequences."""

    @classmethod
    def build(cls, sequences: Sequence[TokenSequence], device: torch.device | str = "cpu") -> RaggedBatch:
        """The sequences in that order; each has a token."""
        lengths = [len(sequence) for sequence in sequences]
        kinds = (sequence.token_type_ids or [0] * len(sequence) for sequence in sequences)
        positions = [torch.arange(length) for length in lengths]
        return cls(
            token_ids=torch.tensor(
                list(chain.from_iterable(sequence.token_ids for sequence in sequences)), device=device
            ),
            token_type_ids=torch.tensor(list(chain.from_iterable(kinds)), device=device),
            positions=torch.cat(positions).to(device),
            cu_seqlens=torch.tensor([0, *accumulate(lengths)], device=device),
            lengths=lengths,
        )
