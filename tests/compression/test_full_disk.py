"""A compression that meets a full disk says so, and goes on where it was when there is room."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401 -- makes its cache of fonts now, not while writes are counted
import pytest
from safetensors import SafetensorError
from tests.compression.conftest import SaveTiny

from fastserve import cli
from fastserve.atomic_write import WriteError
from fastserve.compression.state import export
from fastserve.compression.state import model_state as state
from fastserve.compression.training import trainer as training

RECIPE = """
steps: [{step: gptq, bits: 4, group_size: 32, targets: ["*.mlp.*"]}]
calibration: {files: [TEXT], samples: 4, length: 32}
"""
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def model(save_byte_model: SaveTiny) -> Path:
    """A model of two layers, whose tokens are bytes."""
    return save_byte_model(num_hidden_layers=2)


class Disk:
    """Notes what is written, and is full from a moment on until there is room again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written: list[str] = []
        """What each write was, numbers left out: those of one kind look alike."""
        self.room: int | None = None
        """How many more writes there is room for; None: for all."""
        rust = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        for owner, name, place, error in (
            (Path, "write_bytes", 0, FULL),
            (Path, "mkdir", 0, FULL),
            (state, "save_file", 1, rust),
            (export.shutil, "copyfile", 1, FULL),
        ):
            monkeypatch.setattr(owner, name, self._watched(getattr(owner, name), place, error))

    def _watched(self, write: Callable[..., Any], place: int, error: Exception) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            self.written.append(f"{write.__name__} {re.sub('[0-9]+', '', Path(arguments[place]).name)}")
            if self.room is not None and len(self.written) > self.room:
                raise error
            return write(*arguments, **options)

        return watched

    def has_room_for(self, writes: int | None) -> None:
        self.written, self.room = [], writes


def layers(written: list[str]) -> int:
    """How many layers are among what was written."""
    return sum("layer" in what for what in written)


def test_a_full_disk_at_any_write_is_a_sentence_and_the_same_command_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("All of it is said in few words. " * 40)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("TEXT", str(tmp_path / "text")))
    disk = Disk(monkeypatch)

    def compress(out: Path) -> int:
        words = ["compress", str(model), "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(out)]
        return cli.main([*words, "--device", "cpu", "--evaluate", "none"])

    whole = tmp_path / "a"
    assert compress(whole) == 0
    expected, order = (whole / "model.safetensors").read_bytes(), disk.written
    kinds = {kind: order.index(kind) for kind in order}
    assert len(kinds) >= 12
    for number, (kind, room) in enumerate(kinds.items()):
        out = tmp_path / "bcdefghijklmnopqrstuvwxyz"[number]
        disk.has_room_for(room)
        assert compress(out) == 1, kind
        said = " ".join(capsys.readouterr().err.split())
        assert ": cannot be written: No space left on device (" in said
        disk.has_room_for(None)
        if out.exists():  # the last to be written are the report's files
            assert "is whole and can be served, only its report is not there" in said
        else:
            assert "make room, and the same command goes on where it was" in said
            assert compress(out) == 0
            # A layer is written again if the states after it were not.
            assert layers(disk.written) <= layers(order) - layers(order[:room]) + 1
        assert (out / "model.safetensors").read_bytes() == expected
        assert list(tmp_path.glob(f"{out.name}.*")) == []


def test_a_checkpoint_of_training_says_why_it_was_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise FULL

    monkeypatch.setattr(training.torch, "save", refuse)
    with pytest.raises(WriteError, match=r"best\.pt: cannot be written: No space left on device \("):
        training._save(tmp_path / "best.pt", {})
    assert list(tmp_path.iterdir()) == []
