"""The error that is raised wherever a model is found, read and checked."""

from __future__ import annotations


class ModelError(Exception):
    """A model that cannot be served; the sentence names the model, what is wrong and, where there is one, the
    remedy."""
