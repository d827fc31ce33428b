"""What a user may name a model by."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.model_path import resolve_model_path


@pytest.mark.parametrize("model", ["/no/such/model", "./owner/name", "nosuchmodel", "a/b/c"])
def test_a_path_that_is_not_there_is_refused(model: str) -> None:
    with pytest.raises(ModelError, match="no such file or directory"):
        resolve_model_path(model)


def test_a_hub_name_without_a_network_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"owner/name: not on this machine, .*`hf download owner/name`"):
        resolve_model_path("owner/name")


def test_a_name_that_the_hub_cannot_have_is_refused() -> None:
    with pytest.raises(ModelError, match="the hub refused it"):
        resolve_model_path("owner/na me")
