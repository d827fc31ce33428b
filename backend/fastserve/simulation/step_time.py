"""How long a step of the engine takes: a linear model of what it computes, fitted to measured steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
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
    device: str
    """The CPU or GPU that it was measured on."""
    num_threads: int
    """Of the engine, on a CPU."""
    num_steps: int
    """Points that were measured."""
    r_squared: float
    """The share of the variance of the measured seconds that the model explains."""
    median_relative_error: float
    """Of the model's seconds against the measured ones, over the points."""

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
