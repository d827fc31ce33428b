"""The error of recipes and of the models that they are for."""

from __future__ import annotations


class RecipeError(ValueError):
    """A recipe that cannot be followed; the sentence names step and field, what came and what is allowed."""
