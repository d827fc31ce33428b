"""What an encoder answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Classification:
    """The label of a text."""

    label: str
    """The one of the highest score."""
    score: float
    """From 0 to 1: the label's probability."""
    scores: Mapping[str, float]
    """Of every label, or of those that were asked for."""


@dataclass(frozen=True)
class TokenLabel:
    """The label of a token of a text."""

    start: int
    """Of the token in the text, in characters."""
    end: int
    label: str
    score: float
    """From 0 to 1: the label's probability."""


@dataclass(frozen=True)
class RankedDocument:
    """A document's place among those of a query."""

    index: int
    """Of the document in the request."""
    score: float
    """The higher, the more relevant; from 0 to 1 unless the model's files ask for the number as it is."""
