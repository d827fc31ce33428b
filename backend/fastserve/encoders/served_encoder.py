"""An encoder as a model of Triton server: its settings, what was measured of it, and its configuration.

Imports no torch: the launcher writes with it what the model reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import msgspec
from msgspec import Struct

from fastserve.config import Config, ConfigError

SETTINGS_PARAMETER = "fastserve_encoder"
"""The parameter of a model's configuration that holds its `EncoderSettings`."""
LABELS_PARAMETER = "labels"
"""The parameter that names a classifier's labels, for clients: a JSON list."""
MAX_BATCH_SIZE = 256
"""Texts of a request, and of a batch, at most."""
MAX_PRIORITY_LEVELS = 64
"""Triton server keeps a queue for each level."""
GOOD_THROUGHPUT = 0.95
"""Of the best: the smallest batch that reaches it is preferred, since larger ones only wait longer."""
BATCH_SECONDS = 1e-3
"""What a batch takes besides its computation: the server, the shared memory, the threads of the stub."""


class EncoderSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a served encoder is loaded; see `model_parts.EncoderOptions`."""

    model: str
    """A directory, or a name of the hub."""
    dtype: str = "auto"
    quantization: str = "auto"
    device: str = "auto"
    num_threads: int
    """Of its products on a CPU."""


class EncoderProfile(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What loading and running an encoder showed."""

    task: str
    """"embed", "classify" or "rerank"."""
    labels: list[str]
    labels_tokens: bool
    """Each token has a label, not each text."""
    dimensions: int
    """Of an embedding."""
    max_length: int
    step_seconds: dict[int, float]
    """How long it takes to compute so many texts together."""


class ServedEncoder(Struct, frozen=True, kw_only=True):
    """A model of the repository."""

    name: str
    settings: EncoderSettings
    profile: EncoderProfile


class Batching(Struct, frozen=True):
    """What Triton server's dynamic batcher is told."""

    preferred_batch_size: int
    max_queue_delay_us: int


def batching(step_seconds: Mapping[int, float]) -> Batching:
    """From measured steps: t(b) seconds for b texts.

    Preferred is the smallest batch of at least `GOOD_THROUGHPUT` of the best throughput, which is
    b / (t(b) + BATCH_SECONDS). A text waits for another, while nothing is computed, no longer than it gains
    if one comes: two together take t(2), one after the other 2 t(1), so each gains t(1) - t(2) / 2. Where
    batches gain nothing, it waits for none.
    """
    throughput = {size: size / (seconds + BATCH_SECONDS) for size, seconds in step_seconds.items()}
    best = max(throughput.values())
    preferred = min(size for size, rate in throughput.items() if rate >= GOOD_THROUGHPUT * best)
    gain = step_seconds[1] - step_seconds[2] / 2
    return Batching(preferred, max(0, round(gain * 1e6)))


def priority_level(priority: int, priority_range: tuple[int, int]) -> int:
    """Triton server's level of one of our priorities: its levels are from 1, the most urgent."""
    return priority_range[1] - priority + 1


def check_priority_range(config: Config) -> None:
    """Raises ConfigError where the range has more levels than a batcher gets."""
    low, high = config.priority_range
    if high - low + 1 > MAX_PRIORITY_LEVELS:
        raise ConfigError(
            f"--priority-range: got {low},{high}; allowed with --encoder: at most {MAX_PRIORITY_LEVELS} "
            "priorities"
        )


def model_config(encoder: ServedEncoder, config: Config) -> str:
    """The text of `config.pbtxt`."""
    profile = encoder.profile
    inputs = ("query", "document") if profile.task == "rerank" else ("text",)
    lines = [
        f"name: {_text(encoder.name)}",
        'backend: "python"',
        f"max_batch_size: {MAX_BATCH_SIZE}",
        *_tensors("input", dict.fromkeys(inputs, ("TYPE_STRING", 1))),
        *_tensors("output", outputs_of(profile)),
        *_dynamic_batching(batching(profile.step_seconds), config),
        *_parameter(SETTINGS_PARAMETER, msgspec.json.encode(encoder.settings).decode()),
        *_parameter(LABELS_PARAMETER, json.dumps(profile.labels)),
        "instance_group [ { kind: KIND_CPU, count: 1 } ]",
    ]
    return "\n".join([*lines, ""])


def outputs_of(profile: EncoderProfile) -> dict[str, tuple[str, int]]:
    """The output tensors, each with its type and its length for a text; the first dimension is the texts'."""
    if profile.task == "embed":
        answer = {"embedding": ("TYPE_FP32", -1)}
    elif profile.task == "rerank":
        answer = {"score": ("TYPE_FP32", 1)}
    elif profile.labels_tokens:
        answer = {"tokens": ("TYPE_STRING", 1)}
    else:
        answer = {"label": ("TYPE_STRING", 1), "score": ("TYPE_FP32", 1), "scores": ("TYPE_STRING", 1)}
    return answer | {"num_tokens": ("TYPE_INT32", 1)}


def _tensors(kind: str, tensors: Mapping[str, tuple[str, int]]) -> list[str]:
    rows = [
        f'  {{ name: "{name}", data_type: {data_type}, dims: [ {length} ] }}'
        for name, (data_type, length) in tensors.items()
    ]
    return [f"{kind} [", ",\n".join(rows), "]"]


def _dynamic_batching(rule: Batching, config: Config) -> list[str]:
    low, high = config.priority_range
    levels = [
        f"  priority_levels: {high - low + 1}",
        f"  default_priority_level: {priority_level(0, config.priority_range)}",
    ]
    if config.keys_file:  # a model does not see the level, and could not hold a key to its range
        levels = []
    return [
        "dynamic_batching {",
        f"  preferred_batch_size: [ {rule.preferred_batch_size} ]",
        f"  max_queue_delay_microseconds: {rule.max_queue_delay_us}",
        *levels,
        "  default_queue_policy {",
        "    timeout_action: REJECT",
        f"    default_timeout_microseconds: {round(config.max_queue_seconds * 1e6)}",
        "    allow_timeout_override: true",
        f"    max_queue_size: {config.max_queue_size}",
        "  }",
        "}",
    ]


def _parameter(key: str, value: str) -> list[str]:
    return ["parameters {", f'  key: "{key}"', f"  value {{ string_value: {_text(value)} }}", "}"]


def _text(value: str) -> str:
    """A string as protobuf's text format has it."""
    escaped = "".join(
        chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\' else f"\\{byte:03o}"
        for byte in value.encode()
    )
    return f'"{escaped}"'
