"""Tokens per second, and bytes read per token, of tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.progress import Progress

from fastserve.compression.report.speed import bytes_per_token, measure_speeds
from fastserve.models.model_loader import load_model

SaveTiny = Callable[..., Path]


@pytest.fixture
def served(save_tiny: SaveTiny, save_byte_tokenizer: Callable[..., Path]) -> Path:
    """With a tokenizer beside it."""
    directory = save_tiny(vocab_size=257)
    for file in save_byte_tokenizer().glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def test_each_model_is_measured_at_each_batch(served: Path) -> None:
    progress = Progress(disable=True)
    models = {"before": str(served), "after": str(served)}
    speeds = measure_speeds(
        models, served, progress, batches=(1, 4), rounds=1, prompt_tokens=8, output_tokens=16
    )
    assert {name: list(found) for name, found in speeds.items()} == {"before": [1, 4], "after": [1, 4]}
    assert all(speed > 0 for found in speeds.values() for speed in found.values())
    assert progress.tasks[0].completed == 2


def test_a_token_reads_all_weights_but_the_embedding(save_tiny: SaveTiny) -> None:
    hidden, mlp, layers, vocab, kv = 64, 128, 3, 128, 32
    per_layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * mlp + 2 * hidden
    expected = 4 * (layers * per_layer + hidden + vocab * hidden)
    directory = str(save_tiny())
    assert bytes_per_token(load_model(directory)) == expected
    assert bytes_per_token(load_model(directory, one_layer_at_a_time=True)) == expected


def test_four_bits_read_about_an_eighth_of_float32(save_tiny: SaveTiny) -> None:
    directory = str(save_tiny())
    dense, packed = (bytes_per_token(load_model(directory, quantization=name)) for name in ("none", "int4"))
    assert dense is not None
    assert packed is not None
    assert packed < dense / 4
