"""The flags of `fastserve serve` for encoders."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest

from fastserve.checkpoints.online_quantization import QUANTIZATIONS
from fastserve.commands import encoder_options
from fastserve.commands.encoder_options import add_encoder_flags, served_encoders
from fastserve.config import Config, ConfigError
from fastserve.encoders.served_encoder import EncoderProfile, EncoderSettings
from fastserve.models.model_loader import DTYPES


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[EncoderSettings]:
    """Each model is an embedder, but for those whose name says otherwise; what was asked about."""
    asked: list[EncoderSettings] = []

    def profile(settings: EncoderSettings) -> EncoderProfile:
        asked.append(settings)
        task = "rerank" if "rerank" in settings.model else "embed"
        seconds = {1: 0.001, 2: 0.002}
        return EncoderProfile(
            task=task, labels=[], labels_tokens=False, dimensions=8, max_length=9, step_seconds=seconds
        )

    monkeypatch.setattr(encoder_options, "encoder_profile", profile)
    return asked


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("one", "two", "rerank", "a=b"):
        (tmp_path / name).mkdir()
    return tmp_path


def served(*words: str, **config: Any) -> Any:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-repository", type=Path)
    add_encoder_flags(parser)
    return served_encoders(parser.parse_args(words), Config(**config))


def test_an_encoder_is_named_by_its_task_or_by_the_flag(
    models: Path, measured: list[EncoderSettings]
) -> None:
    found = served(
        *("--encoder", f"{models}/one", "--encoder", f"mine={models}/two", "--encoder", f"{models}/rerank"),
        *(
            "--encoder",
            f"other={models}/a=b",
            "--encoder-dtype",
            "bfloat16",
            "--encoder-quantization",
            "w8a8",
        ),
    )
    assert [(each.name, each.settings.model) for each in found] == [
        ("embed", f"{models}/one"),
        ("mine", f"{models}/two"),
        ("rerank", f"{models}/rerank"),
        ("other", f"{models}/a=b"),
    ]
    assert {(each.dtype, each.quantization) for each in measured} == {("bfloat16", "w8a8")}
    assert served("--encoder", f"{models}/a=b")[0].name == "embed"


def test_threads_are_shared_with_a_model_that_generates(models: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    one = ("--encoder", f"{models}/one")
    assert served(*one)[0].settings.num_threads == max(1, cores // 2)
    assert served(*one, "--encoders-only")[0].settings.num_threads == cores
    assert served(*one, "--encoder-threads", "3")[0].settings.num_threads == 3


@pytest.mark.parametrize(
    ("words", "config", "sentence"),
    [
        (["--encoders-only"], {}, "--encoders-only: got no encoder; allowed: with at least one --encoder"),
        (["--encoder", "{}/one", "--encoder", "{}/two"], {}, "a second model `embed`; allowed: NAME=PATH"),
        (["--encoder", "engine={}/one"], {}, "a second model `engine`; allowed: NAME=PATH"),
        (
            ["--encoder", "{}/one", "--encoder-threads", "-1"],
            {},
            "--encoder-threads: got -1; allowed: 0 or more",
        ),
        (["--encoder", "{}/one"], {"priority_range": (-99, 99)}, "--priority-range: got -99,99"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_flag(
    words: list[str], config: dict[str, Any], sentence: str, models: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        served(*(word.format(models) for word in words), **config)


def test_nothing_is_measured_without_encoders(measured: list[EncoderSettings]) -> None:
    assert served() == ()
    assert measured == []


def test_the_words_are_those_of_the_models() -> None:
    assert encoder_options.QUANTIZATION_NAMES == QUANTIZATIONS
    assert set(encoder_options.DTYPE_NAMES) == {"auto", *DTYPES}
