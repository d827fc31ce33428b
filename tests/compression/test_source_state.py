"""What the state before the first step reads of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file

from fastserve.compression.state.source_state import SourceState
from fastserve_kernels.formats import Dense


def test_a_trained_head_beside_tied_embeddings_is_kept(save_tiny: Callable) -> None:
    """As it is served: else the model that comes out has the embedding for a head."""
    directory = save_tiny(tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    assert "lm_head" not in SourceState(directory).outer()
    head = torch.randn(128, 64)
    save_file(tensors | {"lm_head.weight": head}, directory / "model.safetensors")
    source = SourceState(directory)
    assert not source.config.tie_word_embeddings
    found = source.outer()["lm_head"]
    assert isinstance(found, Dense)
    assert torch.equal(found.weight, head)
