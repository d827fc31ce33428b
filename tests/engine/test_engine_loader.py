"""Where a replica runs, and what loading one does not wait for."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from fastserve import Model
from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import Config, ConfigError
from fastserve.engine.engine_loader import choose_device, load_engine
from fastserve_kernels.cpu.kernels.cpu_features import INTEGER_PRODUCTS, has


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


def test_decode_steps_of_the_default_model_are_captured_and_change_no_token(
    default_model: ModelFiles, helpers: Any
) -> None:
    if not has(*INTEGER_PRODUCTS):
        pytest.skip("this processor lacks AVX2, FMA or F16C")
    engine = load_engine(Config(kv_cache_bytes=1 << 24, max_num_seqs=4), default_model)
    assert engine.runner._captured_step is not None
    answers = []
    for captured in (engine.runner._captured_step, None):
        engine.runner._captured_step = captured
        for uid in "ab":
            engine.add(helpers.make_add(uid, [19, 100 + ord(uid)], temperature=0.0, max_tokens=12))
        outputs = helpers.run_until_idle(engine)
        answers.append([helpers.tokens_of(outputs[uid]) for uid in "ab"])
    assert answers[0] == answers[1]
