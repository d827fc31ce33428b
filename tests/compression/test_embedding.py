"""The embedding and the head in few bits."""

from __future__ import annotations

import pytest
import torch
from tests.compression.conftest import RunStep, SaveTiny

from fastserve.compression.errors import RecipeError
from fastserve.compression.quantization.embedding import Embedding
from fastserve.compression.state.source_state import SourceState
from fastserve_kernels.formats import Int4, Int8


def test_a_tied_embedding_stays_tied(source: SourceState, run_step: RunStep) -> None:
    after = run_step(Embedding(bits=8), source)
    outer = after.outer()
    assert isinstance(outer["model.embed_tokens"], Int8)
    assert "lm_head" not in outer
    model = after.transformers_model(torch.float32)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert torch.equal(
        after.linears(1)["mlp.up_proj"].dequantize(), source.linears(1)["mlp.up_proj"].dequantize()
    )


def test_a_head_of_its_own_is_quantized_too(save_tiny: SaveTiny, run_step: RunStep) -> None:
    after = run_step(Embedding(bits=4, group_size=32), SourceState(save_tiny(tie_word_embeddings=False)))
    outer = after.outer()
    assert isinstance(outer["model.embed_tokens"], Int4)
    assert isinstance(outer["lm_head"], Int4)


def test_groups_that_do_not_divide_the_rows_are_refused(source: SourceState) -> None:
    with pytest.raises(RecipeError, match="group_size: got 128; allowed: a divisor of the 64 columns"):
        Embedding(group_size=128).check(source.config)


def test_what_is_quantized_already_is_refused(source: SourceState, run_step: RunStep) -> None:
    after = run_step(Embedding(), source)
    with pytest.raises(RecipeError, match=r"model\.embed_tokens is Int8; allowed: a dense one"):
        run_step(Embedding(), after, "again")
