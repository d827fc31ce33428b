"""What several areas of the tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

# Here, before anything imports triton, which reads it once: its kernels then run interpreted, on CPU tensors.
# On a machine with a GPU, TRITON_INTERPRET=0 has the tests compile them.
os.environ.setdefault("TRITON_INTERPRET", "1")

from fastserve.checkpoints.model_files import ModelFiles, locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="the full samples: an hour, not minutes")


def pytest_configure(config: pytest.Config) -> None:
    """Every run draws the same examples, so that a change is judged by what it changed; with `--soak` others
    each time. None has a deadline: a machine that is busy makes no example a wrong one."""
    settings.register_profile("fastserve", deadline=None, derandomize=not config.getoption("--soak"))
    settings.load_profile("fastserve")


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether to take a full sample in place of a small one."""
    return bool(request.config.getoption("--soak"))


@pytest.fixture(scope="session")
def default_model() -> ModelFiles:
    """SmolLM2-135M-Instruct: fetched once, then in the user's cache."""
    return locate("")


@pytest.fixture(scope="session")
def default_model_path(default_model: ModelFiles) -> Path:
    return default_model.checkpoint


@pytest.fixture(scope="session")
def transformers_model(default_model_path: Path) -> PreTrainedModel:
    """The default model as transformers computes it, in float32. Nobody may change it."""
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        default_model_path.parent,
        gguf_file=default_model_path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )


@pytest.fixture(scope="session")
def tokenizer_directory(default_model: ModelFiles) -> Path:
    return default_model.tokenizer
