"""A compression that is killed goes on where it was, and ends in the same bytes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from tests.compression.conftest import SaveTiny

from fastserve.checkpoints.model_files import locate
from fastserve.compression.pipeline import PARTIAL, compress
from fastserve.compression.recipe import parse_recipe

RECIPE = {
    "steps": [
        {"step": "wanda", "pattern": "2:4"},
        {"step": "gptq", "bits": 4, "group_size": 32},
        {"step": "kv_cache", "dtype": "int8"},
    ],
    "calibration": {"samples": 8, "length": 32},
}
KILLED = """
import os, signal, sys
import torch
from pathlib import Path
from tests.compression.test_resume import run

left = int(sys.argv[3])
finish = os.replace

def replace(*paths):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    finish(*paths)

os.replace = replace
torch.set_num_threads(1)
run(Path(sys.argv[1]), Path(sys.argv[2]))
"""
"""Runs the recipe, and is killed before a file gets its name: half of what belongs together is there."""


@pytest.fixture
def model(save_byte_model: SaveTiny) -> Path:
    """A model whose tokens are bytes."""
    return save_byte_model()


def run(model: Path, out: Path) -> None:
    """Compresses the model by RECIPE."""
    compress(locate(str(model)), parse_recipe(RECIPE), out, torch.device("cpu"), Progress(disable=True))


def digests(directory: Path) -> dict[str, str]:
    """Of every file."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}


@pytest.fixture
def files_written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that come to be whole while the test runs, as they come."""
    names: list[str] = []
    finish = os.replace

    def replace(unfinished: Any, path: Any) -> None:
        names.append(Path(path).name)
        finish(unfinished, path)

    monkeypatch.setattr(os, "replace", replace)
    return names


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    model: Path, tmp_path: Path, files_written: list[str]
) -> None:
    run(model, tmp_path / "whole")
    expected, total = digests(tmp_path / "whole"), len(files_written)
    for share in (0.2, 0.5, 0.8):
        out = tmp_path / f"killed-{share}"
        words = [sys.executable, "-c", KILLED, str(model), str(out), str(int(total * share))]
        killed = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not out.exists()
        done = int(total * share) - 1
        files_written.clear()
        run(model, out)
        # It writes again what was not whole, and what a layer's file is no use without.
        assert len(files_written) <= total - done + 2
        assert digests(out) == expected
        assert not out.with_name(out.name + PARTIAL).exists()


def test_two_runs_end_in_the_same_bytes(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "one")
    run(model, tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
