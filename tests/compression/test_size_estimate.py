"""What is said of a result's size before it is made holds when it is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from tests.compression.conftest import SaveTiny

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.compression.pipeline import compress
from fastserve.compression.recipe import parse_recipe
from fastserve.compression.report.report import bytes_on_disk
from fastserve.compression.report.size_estimate import estimated_bytes
from fastserve.compression.state.source_state import SourceState

STEPS: dict[str, list[dict[str, Any]]] = {
    "int4": [{"step": "gptq"}],
    "int8": [{"step": "round", "symmetric": True}],
    "3 bits": [{"step": "round", "bits": 3, "group_size": 32}],
    "exact": [{"step": "round", "bits": 5, "zero_points": "exact"}],
    "w8a8": [{"step": "w8a8"}],
    "nf4": [{"step": "codebook"}],
    "by row": [{"step": "mixed_precision", "bits": 4.5}],
    "by linear": [{"step": "mixed_precision", "per": "linear", "bits": 4}],
    "bitmap": [{"step": "wanda", "sparsity": 0.7}],
    "blocks": [{"step": "magnitude", "pattern": "block 32x64"}],
    "2:4": [{"step": "wanda", "pattern": "2:4"}],
    "2:4 in 4 bits": [{"step": "wanda", "pattern": "2:4"}, {"step": "gptq", "symmetric": True}],
    "low rank": [{"step": "low_rank", "parameters": 0.6, "multiple": 1}],
    "head": [{"step": "awq"}, {"step": "gptq"}, {"step": "embedding", "bits": 4}, {"step": "kv_cache"}],
    "structure": [
        {"step": "structure", "parameters": 0.3, "multiple": 32},
        {"step": "gptq", "group_size": 32},
    ],
    "student": [{"step": "distill", "steps": 1, "student": {"hidden_size": 64, "num_hidden_layers": 1}}],
    "some": [{"step": "round", "targets": ["*.mlp.*"]}],
}


@pytest.mark.parametrize("name", STEPS)
def test_the_estimate_is_near_to_what_comes(
    name: str, save_tiny: SaveTiny, save_byte_tokenizer: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("All of it is said in few words. " * 40)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 257, "num_hidden_layers": 2}
    checkpoint = save_tiny(dtype=torch.bfloat16, **sizes)
    files = ModelFiles(checkpoint, save_byte_tokenizer())
    calibration = {"files": [str(tmp_path / "text")], "samples": 2, "length": 32}
    recipe = parse_recipe({"steps": STEPS[name], "calibration": calibration})
    expected = estimated_bytes(recipe, SourceState(files.checkpoint))
    compress(files, recipe, tmp_path / "out", torch.device("cpu"), Progress(disable=True))
    header = 20_000  # bytes of names and shapes, which count for nothing in a model of any size
    assert expected == pytest.approx(bytes_on_disk(tmp_path / "out") - header / 2, rel=0.03, abs=header / 2)


@pytest.mark.parametrize(
    "step", [{"step": "magnitude", "threshold": 0.1}, {"step": "low_rank", "error": 0.1}], ids=str
)
def test_what_only_the_run_can_tell_is_not_guessed(step: dict[str, Any], save_tiny: SaveTiny) -> None:
    assert estimated_bytes(parse_recipe({"steps": [step]}), SourceState(save_tiny())) is None
