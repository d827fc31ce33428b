"""Which tokens end an answer, how many token ids there are, and how long a sequence may be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.model_metadata import context_length, eos_token_ids, model_vocab_size
from fastserve.checkpoints.safetensors_files import SINGLE

EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, []),
        ({"config.json": {"eos_token_id": 2}}, [2]),
        ({"config.json": {"eos_token_id": [4, 3]}}, [3, 4]),
        ({"config.json": {"text_config": {"eos_token_id": 2}}}, [2]),
        ({"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": [7, 5]}}, [5, 7]),
        ({"config.json": {"eos_token_id": 2}, "generation_config.json": {"temperature": 1}}, [2]),
        ({"config.json": {"eos_token_id": 2}, "tokenizer_config.json": {"eos_token": "<end>"}}, [1, 2]),
        ({"tokenizer_config.json": {"eos_token": {"content": "<end>"}}}, [1]),
        ({"tokenizer_config.json": {"eos_token": "<unknown>"}}, []),
        ({"config.json": {"eos_token_id": None}, "tokenizer_config.json": {"eos_token": None}}, []),
    ],
)
def test_end_tokens_of_a_directory(files: dict[str, Any], expected: list[int], tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert eos_token_ids(tmp_path) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama", "max_position_embeddings": 77}, 77),
        ({"model_type": "gpt2", "n_positions": 55}, 55),
        (
            {
                "model_type": "phi3",
                "max_position_embeddings": 256,
                "original_max_position_embeddings": 64,
                "hidden_size": 48,
                "num_attention_heads": 4,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [4.0] * 6},
            },
            64,
        ),
    ],
)
def test_context_length_of_a_directory(config: dict[str, Any], expected: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_length(tmp_path) == expected


def test_context_length_of_a_gguf_file(gguf_with_tokenizer: Path) -> None:
    assert context_length(gguf_with_tokenizer) == 16


def test_a_model_that_states_no_length_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ModelError, match="does not say how long a sequence may be"):
        context_length(tmp_path)


def test_a_broken_json_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        eos_token_ids(tmp_path)


@pytest.mark.parametrize(
    ("config", "tensors", "expected"),
    [
        ({"vocab_size": 7}, {EMBEDDING: (7, 4)}, 7),
        ({"text_config": {"vocab_size": 7}}, {"language_model.model.embed_tokens.weight": (7, 4)}, 7),
        ({"vocab_size": 7}, {"transformer.wte.weight": (7, 4), "transformer.wpe.weight": (9, 4)}, 7),
        ({"vocab_size": 7}, {"embed_tokens.weight": (7, 4)}, 7),
        ({}, {"transformer.wte.weight": (7, 4)}, 7),
        ({"vocab_size": 7}, {"model.embed_tokens.weight_packed": (7, 1)}, 7),
    ],
)
def test_vocabulary_of_a_directory(
    config: dict[str, Any], tensors: dict[str, tuple[int, int]], expected: int, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, config, tensors)
    assert model_vocab_size(tmp_path) == expected


def test_a_vocabulary_said_in_two_ways_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"vocab_size": 8}, {EMBEDDING: (7, 4)})
    with pytest.raises(ModelError, match=r"vocab_size is 8, but model\.embed_tokens\.weight has 7 rows"):
        model_vocab_size(tmp_path)
    write_checkpoint(tmp_path, {}, {"lm_head.weight": (7, 4)})
    with pytest.raises(ModelError, match="vocab_size is None, but no tensor embeds tokens"):
        model_vocab_size(tmp_path)


def test_vocabulary_of_a_gguf_file_is_its_embedding(gguf_with_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"it has no token_embd\.weight"):
        model_vocab_size(gguf_with_tokenizer)
    writer = gguf.GGUFWriter(tmp_path / "embedding.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((7, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert model_vocab_size(tmp_path / "embedding.gguf") == 7


def test_the_vocabulary_is_found_without_torch(tmp_path: Path) -> None:
    """The steps of the ensemble refuse ids by it, and none of them has torch's gigabyte."""
    write_checkpoint(tmp_path, {"vocab_size": 7}, {EMBEDDING: (7, 4)})
    program = (
        "import sys; from pathlib import Path; from fastserve.checkpoints.model_metadata import *;"
        f"print(model_vocab_size(Path({str(tmp_path)!r})), 'torch' in sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "7 False"


def write_checkpoint(
    directory: Path, config: dict[str, Any], shapes: dict[str, tuple[int, int]], file: str = SINGLE
) -> None:
    (directory / "config.json").write_text(json.dumps(config))
    save_file(
        {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}, str(directory / file)
    )
