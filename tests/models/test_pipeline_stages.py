"""Stages that compute a decoder one after the other, here in one process, are the whole decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastserve.checkpoints.model_error import ModelError
from fastserve.models.decoder import Decoder
from fastserve.models.kv_cache import make_kv_caches
from fastserve.models.model_loader import check_rank_count, load_model
from fastserve.models.pipeline_stage import split_layers
from fastserve_kernels.attention_metadata import AttentionMetadata

LAYERS, TOKENS = 5, 9


@pytest.fixture
def directory(save_model: Any) -> Path:
    path: Path = save_model("qwen2", num_hidden_layers=LAYERS)[0]
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "int8", "w8a8"])
@pytest.mark.parametrize("count", [2, 3, LAYERS])
def test_stages_compute_what_one_computes(directory: Path, count: int, quantization: str, dtype: str) -> None:
    """In float32 to the last bit. Each has the caches of its own layers."""
    metadata = AttentionMetadata.build([TOKENS], [TOKENS], [[0]], 16, "cpu")

    def caches(model: Any) -> Any:
        return make_kv_caches(model.kv_cache_shapes(1, 16), model.dtype, "cpu")

    whole = load_model(str(directory), dtype, quantization=quantization)
    hidden = torch.arange(TOKENS) * 7 % 90
    expected = whole.forward(hidden, metadata, caches(whole))
    num_layers = 0
    for number in range(count):
        stage = load_model(str(directory), dtype, quantization=quantization, stage=(number, count))
        assert isinstance(stage, Decoder)
        assert (stage.weights.embedding is not None) == (stage.weights.lm_head is not None) == (number == 0)
        num_layers += len(stage.kv_cache_shapes(1, 16))
        hidden = stage.forward(hidden, metadata, caches(stage))
    assert num_layers == LAYERS
    tolerance = 0.0 if dtype == "float32" else 0.05
    torch.testing.assert_close(hidden, expected, atol=tolerance, rtol=tolerance)


@given(num_layers=st.integers(1, 90), head=st.floats(0, 40), share=st.floats(0, 1))
def test_layers_are_dealt_out_evenly(num_layers: int, head: float, share: float) -> None:
    """Each stage has one, and those behind the first differ by one at most; the first, which has the head,
    has no more than they, unless there are too few."""
    count = 1 + int(share * (num_layers - 1))
    ends = split_layers(num_layers, head, count)
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert len(sizes) == count
    assert sum(sizes) == num_layers
    assert min(sizes) >= 1
    if count > 1:
        assert max(sizes[1:]) - min(sizes[1:]) <= 1
        mean = (num_layers + head) / count
        assert sizes[0] == 1 or sizes[0] + head <= mean + 1


def test_more_stages_than_layers_are_refused(directory: Path) -> None:
    with pytest.raises(
        ModelError, match=rf"pipeline_parallel_size: got 6; allowed for {LAYERS} layers: 1 to"
    ):
        check_rank_count(directory, 1, 6)
    check_rank_count(directory, 1, LAYERS)


def test_what_transformers_runs_is_refused(save_model: Any) -> None:
    path, _ = save_model("gpt2", n_embd=48, n_head=4, n_layer=2, n_positions=64)
    for refuse in (
        lambda: check_rank_count(path, 1, 2),
        lambda: load_model(str(path), stage=(0, 2)),
    ):
        with pytest.raises(ModelError, match=r"pipeline_parallel_size: got 2; allowed for .*: 1, because"):
            refuse()
