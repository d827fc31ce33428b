"""Checkpoints as other tools leave them, each loaded as transformers loads it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.model_metadata import model_vocab_size
from fastserve.checkpoints.safetensors_files import INDEX, SINGLE
from fastserve.checkpoints.tokenizer_directory import resolve_tokenizer_directory
from fastserve.checkpoints.transformers_config import read_transformers_config
from fastserve.models.decoder import Decoder
from fastserve.models.model_loader import load_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def loads_like_transformers(equals_transformers: Callable) -> Callable[[Path], None]:
    """Compares the logits of our decoder with those of transformers' model of the same files."""

    def check(directory: Path) -> None:
        model = load_model(str(directory))
        assert isinstance(model, Decoder)
        equals_transformers(model, AutoModelForCausalLM.from_pretrained(directory).eval())

    return check


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = change(load_file(directory / SINGLE))
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def test_a_trained_head_beside_tied_embeddings_is_used(
    save_model: Callable, loads_like_transformers: Callable
) -> None:
    """Fine-tuning with untied weights leaves the base model's `tie_word_embeddings: true` in config.json."""
    directory, _ = save_model("llama", tie_word_embeddings=True)
    rewrite(directory, lambda tensors: tensors | {"lm_head.weight": torch.randn(199, 48)})
    loads_like_transformers(directory)


def test_the_head_of_tied_embeddings_may_be_stored_in_place_of_them(
    save_model: Callable, loads_like_transformers: Callable
) -> None:
    directory, _ = save_model("llama", tie_word_embeddings=True)
    rewrite(directory, lambda tensors: tensors | {"lm_head.weight": tensors.pop("model.embed_tokens.weight")})
    loads_like_transformers(directory)


def test_a_head_of_another_shape_beside_tied_embeddings_is_named(save_model: Callable) -> None:
    directory, _ = save_model("llama", tie_word_embeddings=True)
    rewrite(directory, lambda tensors: tensors | {"lm_head.weight": torch.randn(200, 48)})
    with pytest.raises(ModelError, match=r"misshapen tensors: lm_head\.weight \[200, 48\]"):
        load_model(str(directory))


def test_tables_and_value_heads_left_by_training_are_passed_over_in_one_line(
    save_model: Callable, loads_like_transformers: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    directory, _ = save_model("llama")
    left = {
        f"model.layers.{layer}.self_attn.rotary_emb.{table}": torch.randn(6)
        for layer in range(3)
        for table in ("inv_freq", "cos_cached", "sin_cached")
    } | {"v_head.summary.weight": torch.randn(1, 48), "v_head.summary.bias": torch.randn(1)}
    rewrite(directory, lambda tensors: tensors | left)
    with caplog.at_level(logging.WARNING, logger="fastserve"):
        loads_like_transformers(directory)
    (line,) = (record.getMessage() for record in caplog.records if record.name.startswith("fastserve"))
    assert line.startswith("tensors without a use here, left by tools of training: model.layers.0.self_attn")


def test_biases_of_zeros_are_passed_over_and_others_are_not(
    save_model: Callable, loads_like_transformers: Callable
) -> None:
    """GPTQ tools write a bias for every linear layer, of models without any too."""
    directory, _ = save_model("llama")
    name = "model.layers.0.mlp.up_proj.bias"
    rewrite(directory, lambda tensors: tensors | {name: torch.zeros(80)})
    loads_like_transformers(directory)
    rewrite(directory, lambda tensors: tensors | {name: torch.ones(80)})
    with pytest.raises(ModelError, match=f"unexpected tensors: {name}"):
        load_model(str(directory))


def test_the_single_file_is_read_whatever_an_index_says(
    save_model: Callable, loads_like_transformers: Callable
) -> None:
    """Merging shards into one file leaves the index behind."""
    directory, _ = save_model("llama")
    names = load_file(directory / SINGLE)
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    loads_like_transformers(directory)
    assert model_vocab_size(directory) == 199


def test_tensors_may_lie_in_another_shard_than_the_index_says(
    save_model: Callable, loads_like_transformers: Callable
) -> None:
    directory, _ = save_model("llama", max_shard_size="100KB")
    index = json.loads((directory / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"] = {
        name: files[number % len(files)] for number, name in enumerate(index["weight_map"])
    }
    (directory / INDEX).write_text(json.dumps(index))
    loads_like_transformers(directory)


def test_a_broken_index_is_named(save_model: Callable) -> None:
    directory, _ = save_model("llama", max_shard_size="100KB")
    (directory / INDEX).write_text('{"weight_map": []}')
    with pytest.raises(ModelError, match=rf"{INDEX}: not an index of safetensors files"):
        load_model(str(directory))


def test_tensors_without_the_prefix_of_the_body(
    save_model: Callable, loads_like_transformers: Callable
) -> None:
    """`AutoModel(...).save_pretrained` saves the body alone: `layers.0...`, not `model.layers.0...`."""
    directory, _ = save_model("llama", tie_word_embeddings=True)
    rewrite(
        directory,
        lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
    )
    loads_like_transformers(directory)


@pytest.mark.parametrize("name", ["config.json", SINGLE, INDEX])
def test_a_pointer_of_git_lfs_is_named(name: str, save_model: Callable) -> None:
    directory, _ = save_model("llama")
    if name == INDEX:
        (directory / SINGLE).unlink()
    (directory / name).write_text(POINTER)
    with pytest.raises(ModelError, match=rf"{name}: a pointer of Git LFS.*`git lfs pull`"):
        load_model(str(directory))


def test_weights_of_other_models_that_are_pointers_are_named(save_model: Callable) -> None:
    directory, _ = save_model("gpt2")
    (directory / SINGLE).write_text(POINTER)
    with pytest.raises(ModelError, match=rf"{SINGLE}: a pointer of Git LFS"):
        load_model(str(directory))


def test_a_tokenizer_and_a_gguf_file_that_are_pointers_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(POINTER)
    with pytest.raises(ModelError, match=r"tokenizer\.json: a pointer of Git LFS"):
        resolve_tokenizer_directory(tmp_path)
    (tmp_path / "model.gguf").write_text(POINTER)
    with pytest.raises(ModelError, match=r"model\.gguf: a pointer of Git LFS"):
        load_model(str(tmp_path / "model.gguf"))
    (tmp_path / "config.json").write_text(POINTER)
    with pytest.raises(ModelError, match=r"config\.json: a pointer of Git LFS"):
        read_transformers_config(tmp_path)
