"""Where a replica runs."""

from __future__ import annotations

import pytest
import torch

from fastserve import Model
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
