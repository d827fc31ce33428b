"""GGUF files: tiny ones written here, and the default model, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from fastserve.checkpoints.decoder_config import DecoderConfig
from fastserve.checkpoints.gguf_config import gguf_config
from fastserve.checkpoints.gguf_file import GgufFile
from fastserve.checkpoints.model_error import ModelError
from fastserve.models.decoder import Decoder
from fastserve.models.model_loader import load_model

SIZES = {"hidden_size": 64, "intermediate_size": 96}
WriteGguf = Callable[..., Path]


@pytest.mark.parametrize(
    ("model_type", "config", "tensor_type"),
    [
        ("llama", {}, Type.F32),
        ("llama", {}, Type.F16),
        ("llama", {"tie_word_embeddings": True}, Type.Q8_0),
        ("llama", {"attention_bias": True}, Type.Q4_1),
        ("qwen2", {"tie_word_embeddings": True}, Type.Q8_0),
        ("qwen3", {"head_dim": 32}, Type.Q4_1),
    ],
)
def test_round_trip(
    model_type: str,
    config: dict[str, Any],
    tensor_type: Type,
    write_gguf: WriteGguf,
    save_model: Callable,
    equals_transformers: Callable,
) -> None:
    _, reference = save_model(model_type, **SIZES, **config)
    path = write_gguf(reference, model_type, tensor_type)
    model = load_model(str(path), "float32")
    assert isinstance(model, Decoder)
    assert model.config == DecoderConfig.from_transformers(gguf_config(GgufFile(path)))
    equals_transformers(model, reference)


def test_rotary_scaling_and_window(
    write_gguf: WriteGguf,
    save_model: Callable,
    equals_transformers: Callable,
) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    _, reference = save_model("mistral", **SIZES, rope_parameters=rope, sliding_window=6, head_dim=16)
    metadata = {
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 4.0,
        "attention.sliding_window": 6,
    }
    path = write_gguf(reference, "llama", Type.F32, metadata)
    equals_transformers(load_model(str(path), "float32"), reference)


def test_header_reader_agrees_with_the_library(write_gguf: WriteGguf, save_model: Callable) -> None:
    _, reference = save_model("llama", **SIZES)
    path = write_gguf(reference, "llama", Type.Q8_0)
    file, whole = GgufFile(path), gguf.GGUFReader(path)
    for key, field in whole.fields.items():
        if key != "tokenizer.ggml.tokens":
            assert file.value(key) == field.contents()
    assert list(file.tensors) == [tensor.name for tensor in whole.tensors]
    for tensor in whole.tensors:
        np.testing.assert_array_equal(file.tensors[tensor.name].data, tensor.data)


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="architecture 'mamba' is not one of llama, qwen2, qwen3, gemma,"):
        load_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("content", [b"", b"no GGUF file at all", b"GGUF\x03\x00\x00\x00\x05"])
def test_broken_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        load_model(str(path))


def test_cut_off_file_is_refused(write_gguf: WriteGguf, save_model: Callable) -> None:
    _, reference = save_model("llama", **SIZES)
    path = write_gguf(reference, "llama", Type.F32)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        load_model(str(path))
