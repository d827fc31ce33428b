"""The configuration of a served encoder: what was measured decides how it is batched."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from fastserve.config import Config, ConfigError
from fastserve.encoders import encoder_profile as profiles
from fastserve.encoders.measure_steps import BATCH_SIZES, measure
from fastserve.encoders.served_encoder import (
    LABELS_PARAMETER,
    SETTINGS_PARAMETER,
    EncoderProfile,
    EncoderSettings,
    ServedEncoder,
    batching,
    check_priority_range,
    model_config,
    priority_level,
)

SETTINGS = EncoderSettings(model='/models/a "quoted" \\ é name', num_threads=2)


def profile(**given: Any) -> EncoderProfile:
    fields: dict[str, Any] = {
        "task": "embed",
        "labels": [],
        "labels_tokens": False,
        "dimensions": 8,
        "max_length": 512,
        "step_seconds": {1: 0.003, 2: 0.004, 4: 0.006, 8: 0.0104},
    }
    return EncoderProfile(**(fields | given))


def configuration(config: Config | None = None, **given: Any) -> Any:
    encoder = ServedEncoder(name="mine", settings=SETTINGS, profile=profile(**given))
    text = model_config(encoder, config or Config())
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_a_text_waits_as_long_as_a_second_one_would_gain_it() -> None:
    """Two take 4 ms together and 6 ms one after the other: each gains 1 ms."""
    rule = batching(profile().step_seconds)
    assert (rule.preferred_batch_size, rule.max_queue_delay_us) == (8, 1000)


def test_where_batches_gain_nothing_none_is_waited_for() -> None:
    """Larger ones are preferred all the same, for what a batch costs besides."""
    rule = batching({1: 0.001, 2: 0.002, 4: 0.0041})
    assert (rule.preferred_batch_size, rule.max_queue_delay_us) == (4, 0)


@given(st.lists(st.floats(1e-5, 1.0), min_size=3, max_size=3))
def test_the_rule_gives_what_a_batcher_can_take(seconds: list[float]) -> None:
    rule = batching(dict(zip((1, 2, 4), seconds, strict=True)))
    assert rule.preferred_batch_size in (1, 2, 4)
    assert 0 <= rule.max_queue_delay_us <= 1e6 * seconds[0]


def test_triton_server_reads_what_was_meant() -> None:
    config = Config(priority_range=(-3, 5), max_queue_size=7, max_queue_seconds=1.5)
    found = configuration(config)
    assert (found.name, found.backend, found.max_batch_size) == ("mine", "python", 256)
    batcher = found.dynamic_batching
    assert list(batcher.preferred_batch_size) == [8]
    assert batcher.max_queue_delay_microseconds == 1000
    assert (batcher.priority_levels, batcher.default_priority_level) == (9, 6)
    policy = batcher.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (7, 1_500_000)
    written = found.parameters[SETTINGS_PARAMETER].string_value
    assert msgspec.json.decode(written, type=EncoderSettings) == SETTINGS
    assert json.loads(found.parameters[LABELS_PARAMETER].string_value) == []


@pytest.mark.parametrize(
    ("given", "inputs", "outputs"),
    [
        ({"task": "embed"}, ["text"], ["embedding"]),
        ({"task": "rerank"}, ["query", "document"], ["score"]),
        ({"task": "classify", "labels": ["a", "b"]}, ["text"], ["label", "score", "scores"]),
        ({"task": "classify", "labels": ["a"], "labels_tokens": True}, ["text"], ["tokens"]),
    ],
)
def test_the_tensors_are_those_of_the_task(
    given: dict[str, Any], inputs: list[str], outputs: list[str]
) -> None:
    found = configuration(**given)
    assert [each.name for each in found.input] == inputs
    assert [each.name for each in found.output] == [*outputs, "num_tokens"]


def test_the_most_urgent_priority_is_the_first_level() -> None:
    assert [priority_level(priority, (-10, 10)) for priority in (10, 0, -10)] == [1, 11, 21]
    check_priority_range(Config())
    with pytest.raises(
        ConfigError, match=r"--priority-range: got -100,100; allowed with --encoder: at most 64"
    ):
        check_priority_range(Config(priority_range=(-100, 100)))


def test_a_profile_is_measured_once(
    save_encoder: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """In a process of its own, which the test does without; when the model's files change, again."""
    directory, _ = save_encoder("bert", "sequence", num_labels=2, id2label={0: "no", 1: "yes"})
    settings = EncoderSettings(model=str(directory), num_threads=1)
    measured: list[EncoderSettings] = []

    def measure_here(given: EncoderSettings) -> EncoderProfile:
        measured.append(given)
        return measure(given, min_seconds=0.0)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(profiles, "_measure", measure_here)
    first = profiles.encoder_profile(settings)
    assert (first.task, first.labels, first.max_length) == ("classify", ["no", "yes"], 512)
    assert list(first.step_seconds) == list(BATCH_SIZES)
    assert profiles.encoder_profile(settings) == first
    assert measured == [settings]
    (directory / "config.json").touch()
    profiles.encoder_profile(settings)
    assert measured == [settings, settings]
