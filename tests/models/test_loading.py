"""What `load_model` says of checkpoints that do not fit, and that shards are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastserve.checkpoints.model_error import ModelError
from fastserve.models.decoder import Decoder
from fastserve.models.model_loader import load_model


def test_shards(
    save_model: Callable,
    equals_transformers: Callable,
) -> None:
    directory, reference = save_model("llama", max_shard_size="100KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    model = load_model(str(directory))
    assert isinstance(model, Decoder)
    equals_transformers(model, reference)


def test_a_lost_shard_is_named(save_model: Callable) -> None:
    directory, _ = save_model("llama", max_shard_size="100KB")
    lost = sorted(directory.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelError, match=lost.name):
        load_model(str(directory))


def test_tensors_that_do_not_fit_are_named(save_model: Callable) -> None:
    directory, _ = save_model("llama")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(47, 48)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        load_model(str(directory))
    message = str(caught.value)
    assert "missing tensors: model.layers.1.mlp.up_proj.weight;" in message
    assert (
        "misshapen tensors: model.layers.0.self_attn.q_proj.weight [47, 48] instead of [48, 48];" in message
    )
    assert message.endswith("unexpected tensors: model.layers.0.self_attn.q_proj.bias")


def test_tensors_known_to_be_redundant_are_passed_over(save_model: Callable) -> None:
    directory, _ = save_model("llama", tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
    save_file(tensors, directory / "model.safetensors")
    assert isinstance(load_model(str(directory)), Decoder)


def test_auto_is_the_dtype_of_the_checkpoint(save_model: Callable) -> None:
    directory, _ = save_model("llama")
    tensors = {name: tensor.half() for name, tensor in load_file(directory / "model.safetensors").items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, directory / "model.safetensors")
    assert load_model(str(directory)).dtype == torch.float16
    assert load_model(str(directory), "float32").dtype == torch.float32


def test_a_checkpoint_in_a_dtype_that_we_do_not_compute_in_needs_one(save_model: Callable) -> None:
    directory, _ = save_model("llama")
    tensors = {name: tensor.double() for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ModelError, match="is F64; name a dtype"):
        load_model(str(directory))
    assert load_model(str(directory), "bfloat16").dtype == torch.bfloat16


def test_length(save_model: Callable) -> None:
    directory, _ = save_model("llama")
    assert load_model(str(directory), max_model_len=100).max_position == 100
    with pytest.raises(ModelError, match=r"max_model_len: got 257; .* allows at most 256"):
        load_model(str(directory), max_model_len=257)


def test_unknown_dtype_is_refused(save_model: Callable) -> None:
    directory, _ = save_model("llama")
    with pytest.raises(ModelError, match="dtype: got 'int8'; allowed: auto, bfloat16, float16, float32"):
        load_model(str(directory), "int8")


def test_directories_without_a_model_are_refused(tmp_path: Path, save_model: Callable) -> None:
    with pytest.raises(ModelError, match="no config that transformers can read"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of our own", "auto_map": {}}))
    with pytest.raises(ModelError, match="no config that transformers can read"):
        load_model(str(tmp_path))
    directory, _ = save_model("llama")
    (directory / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelError, match=r"model\.safetensors: "):
        load_model(str(directory))
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="FastServe reads safetensors only"):
        load_model(str(directory))
