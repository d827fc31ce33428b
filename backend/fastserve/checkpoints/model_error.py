"""The error of everything that finds, reads and checks a model."""

from __future__ import annotations


class ModelError(Exception):
    """A model that cannot be served; the sentence names the model, what is wrong and, where there is one, the
    remedy."""
