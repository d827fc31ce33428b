"""How long a step of the engine takes: a linear model of what it computes, fitted to measured steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, Struct

from fastserve.atomic_write import write_bytes

Seconds = Annotated[float, Meta(ge=0.0)]


class StepTimeError(Exception):
    """A file that is no step-time model; the sentence names it and the field."""


class StepWork(NamedTuple):
    """What a step computes, in the numbers that its time depends on."""

    num_sequences: int
    num_prompt_tokens: int
    """Tokens of prompts, and of sequences that are computed again after a preemption."""
    num_decode_tokens: int
    """One for each sequence that lacked its last token only."""
    num_context_tokens: int
    """Tokens whose keys and values the decodes read: the lengths of their sequences, this token included."""
    num_prompt_pairs: int
    """Pairs of a prompt token and one that it attends to: see `prompt_pairs`."""


def prompt_pairs(num_computed_tokens: int, num_tokens: int) -> int:
    """The pairs in a prompt's chunk of `num_tokens` after `num_computed_tokens`: each token attends to
    all before it and to itself."""
    return num_tokens * num_computed_tokens + num_tokens * (num_tokens + 1) // 2


class StepTimeFit(NamedTuple):
    """Coefficients of a step's time, and how well they say what was measured."""

    coefficients: list[float]
    """Seconds a step, then for each field of `StepWork`; 0 or more."""
    r_squared: float
    """The share of the variance of the measured seconds that is explained."""
    median_relative_error: float


def fit_step_time(work: Sequence[StepWork], seconds: Sequence[float]) -> StepTimeFit:
    """The non-negative coefficients of least squared relative error.

    Relative, because a step of one decode counts as much as a hundred times longer one of prompts. The best
    non-negative solution is a plain one over the terms that are not 0 in it: of the few subsets of terms all
    are tried. Raises ValueError for fewer steps than terms.
    """
    terms = np.column_stack([np.ones(len(work)), np.array(work, dtype=float)])
    measured = np.array(seconds)
    if len(work) < terms.shape[1]:
        raise ValueError(f"a step's time has {terms.shape[1]} terms; got {len(work)} measured steps")
    coefficients = _nonnegative_least_squares(terms / measured[:, None], np.ones(len(work)))
    errors = terms @ coefficients - measured
    r_squared = 1 - (errors**2).sum() / ((measured - measured.mean()) ** 2).sum()
    return StepTimeFit(coefficients.tolist(), float(r_squared), float(np.median(np.abs(errors) / measured)))


def _nonnegative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """x >= 0 that minimizes |matrix x - target|^2."""
    scale = np.maximum(np.abs(matrix).max(axis=0), np.finfo(float).tiny)  # terms differ by many orders
    best, least = np.zeros(matrix.shape[1]), float(target @ target)
    for number in range(1, matrix.shape[1] + 1):
        for columns in map(list, itertools.combinations(range(matrix.shape[1]), number)):
            found = np.linalg.lstsq(matrix[:, columns] / scale[columns], target, rcond=None)[0]
            if (found < 0).any():
                continue
            candidate = np.zeros(matrix.shape[1])
            candidate[columns] = found / scale[columns]
            squares = float(((matrix @ candidate - target) ** 2).sum())
            if squares < least:
                best, least = candidate, squares
    return best


class StepTimeModel(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Seconds of a step = the sum of its terms, each of them 0 or more.

    `fastserve bench --calibrate` writes one for a machine and a model. Copying KV blocks to and from host
    memory is measured beside it, for the cost of a swap.
    """

    seconds_per_step: Seconds
    seconds_per_sequence: Seconds
    seconds_per_prompt_token: Seconds
    seconds_per_decode_token: Seconds
    seconds_per_context_token: Seconds
    seconds_per_prompt_pair: Seconds
    copy_bytes_per_second: Annotated[float, Meta(gt=0.0)]
    """Bytes of KV blocks copied out of the cache, or into it, in a second."""
    kv_bytes_per_token: Annotated[int, Meta(ge=1)]
    """Of all layers' keys and values."""
    model: str
    """The checkpoint's name."""
    machine: str
    """The CPU, and the GPU if there is one, that it was measured on."""
    num_threads: int
    """Of the engine, on a CPU."""
    num_steps: int
    """Points that were measured."""
    r_squared: float
    """The share of the variance of the measured seconds that the model explains."""
    median_relative_error: float
    """Of the model's seconds against the measured ones, over the points."""

    TERMS: ClassVar = (
        "seconds_per_step",
        "seconds_per_sequence",
        "seconds_per_prompt_token",
        "seconds_per_decode_token",
        "seconds_per_context_token",
        "seconds_per_prompt_pair",
    )
    """In the order of `StepTimeFit.coefficients`."""

    def seconds(
        self,
        num_sequences: int,
        num_prompt_tokens: int,
        num_decode_tokens: int,
        num_context_tokens: int,
        num_prompt_pairs: int,
    ) -> float:
        """The seconds of a step; the arguments are those of `StepWork`."""
        return (
            self.seconds_per_step
            + self.seconds_per_sequence * num_sequences
            + self.seconds_per_prompt_token * num_prompt_tokens
            + self.seconds_per_decode_token * num_decode_tokens
            + self.seconds_per_context_token * num_context_tokens
            + self.seconds_per_prompt_pair * num_prompt_pairs
        )

    def save(self, path: Path) -> None:
        """Writes it as JSON. Raises WriteError."""
        write_bytes(path, msgspec.json.format(msgspec.json.encode(self)) + b"\n")

    @classmethod
    def load(cls, path: Path) -> StepTimeModel:
        """Reads what `save` wrote. Raises StepTimeError."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise StepTimeError(f"{path}: {error}") from error
