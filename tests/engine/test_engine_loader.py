"""Where a replica runs, and what loading one does not wait for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastserve import Model
from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import ConfigError
from fastserve.engine.engine_loader import choose_device


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_replicas_go_to_one_gpu_after_another(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device(name, replica).index for replica in range(4)] == [0, 1, 0, 1]
    assert [str(choose_device("cuda:1", replica)) for replica in range(2)] == ["cuda:1"] * 2


def test_without_a_gpu_all_are_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {choose_device("auto", replica).type for replica in range(3)} == {"cpu"}


def test_an_embedded_model_has_no_replicas() -> None:
    with pytest.raises(ConfigError, match="replicas: got 2; allowed: 1"):
        Model.load("none", replicas=2)


def test_a_gguf_file_that_our_decoder_computes_is_loaded_without_transformers(
    default_model: ModelFiles,
) -> None:
    """Its configs take a second and a half of a start."""
    lines = (
        "import sys",
        "from fastserve.checkpoints.model_files import locate",
        "from fastserve.config import Config",
        "from fastserve.engine.engine_loader import load_engine",
        "load_engine(Config(kv_cache_bytes=1 << 24), locate(''))",
        "assert 'transformers' not in sys.modules",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
