"""How a decoder's layers are dealt out to stages, which compute one step after the other.

The first stage has the embedding and the head too: the last one's hidden states come back to it, since tokens
are drawn there. So the stages form a ring, and hidden states are all that goes around.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.checkpoints.decoder_config import DecoderConfig
from fastserve.checkpoints.model_error import ModelError


@dataclass(frozen=True)
class PipelineStage:
    """What one stage has of a decoder."""

    number: int
    """From 0 to `count` - 1."""
    count: int
    layers: range
    num_layers: int
    """Of all stages."""

    @property
    def is_first(self) -> bool:
        """Whether it has the embedding and the head."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the last norm."""
        return self.number == self.count - 1


def make_stage(config: DecoderConfig, number: int, count: int) -> PipelineStage:
    """One of `count` stages. Raises ModelError for more stages than layers."""
    check_stage_count(config, count)
    ends = [0, *split_layers(config.num_layers, head_cost(config), count)]
    return PipelineStage(number, count, range(ends[number], ends[number + 1]), config.num_layers)


def check_stage_count(config: DecoderConfig, count: int) -> None:
    """Raises ModelError, with the allowed sizes, if there are more stages than layers."""
    if count > config.num_layers:
        raise ModelError(
            f"pipeline_parallel_size: got {count}; allowed for {config.num_layers} layers: 1 to "
            f"{config.num_layers}"
        )


def head_cost(config: DecoderConfig) -> float:
    """What the head takes for a token, in layers: by the numbers that are multiplied."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    return config.hidden_size * config.vocab_size / layer


def split_layers(num_layers: int, head: float, count: int) -> list[int]:
    """Where the layers of each stage end, so that the slowest is as fast as it can be: each has one at least,
    and the first has the head too, which takes as long as `head` layers."""
    first = max(1, round((num_layers + head) / count - head)) if count > 1 else num_layers
    first = min(first, num_layers - count + 1)
    left = num_layers - first
    return [first, *(first + left * number // (count - 1) for number in range(1, count))]
