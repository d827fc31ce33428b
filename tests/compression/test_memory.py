"""What a compression takes of a machine's memory, on the real model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.compression.state.source_state import SourceState

COMMAND = """
import sys
from pathlib import Path
from fastserve.cli import main

code = main(sys.argv[1:])
status = Path("/proc/self/status").read_text()
print("peak", next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
sys.exit(code)
"""
"""Prints the most memory that the process held, in kB of resident pages, those of files included."""


def peak_bytes(*words: str) -> int:
    """Of a `fastserve` command in a process of its own."""
    command = [sys.executable, "-c", COMMAND, *words]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return int(finished.stdout.split()[-1]) * 1024


def allowed_bytes(state: SourceState) -> int:
    """The model in bfloat16, two of its decoder layers in float32, and 1 GB."""
    model: Any = state.transformers_model(torch.bfloat16)
    layer = sum(tensor.numel() for tensor in state.dense_layer(0).values())
    return 2 * sum(parameter.numel() for parameter in model.parameters()) + 2 * 4 * layer + 10**9


pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc"
)


def test_a_compression_holds_two_layers_beside_the_model(
    default_model: ModelFiles, tmp_path: Path, soak: bool
) -> None:
    """With `--soak` the whole command as it comes: 128 windows, all layers, perplexity, tokens per second."""
    recipe = tmp_path / "recipe.yaml"
    # All layers are gone through in any case; to round them takes long.
    recipe.write_text(f'steps: [{{step: gptq, targets: ["model.layers.{"" if soak else "0."}*"]}}]')
    words = [
        "compress",
        str(default_model.checkpoint),
        "--recipe",
        str(recipe),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    less = ["--evaluate", "full"] if soak else ["--samples", "2", "--evaluate", "none"]
    assert peak_bytes(*words, *less) <= allowed_bytes(SourceState(default_model.checkpoint))


def test_an_evaluation_does_not_hold_two_models(default_model: ModelFiles) -> None:
    model = str(default_model.checkpoint)
    words = ["--quantization", "none", "--reference", model, "--tokens", "512", "--device", "cpu"]
    assert peak_bytes("evaluate", model, *words) <= allowed_bytes(SourceState(default_model.checkpoint))
