"""GGUF files: tiny ones written here, and the default model, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import PreTrainedModel

from fastserve.models.decoder import Decoder
from fastserve.models.gguf_file import GgufFile
from fastserve.models.loading import load_model
from fastserve.models.model_error import ModelError

SIZES = {"hidden_size": 64, "intermediate_size": 96}
MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The name that llama.cpp gives a tensor of transformers."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{MODULES[module]}.{kind}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{MODULES[inner]}.{kind}"


def write_gguf(
    path: Path, model: PreTrainedModel, architecture: str, tensor_type: Type, **metadata: Any
) -> None:
    """Writes a model as llama.cpp's converter does, and rounds the model's own weights as the file does."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_array("tokenizer.ggml.tokens", [f"<{i}>" for i in range(config.vocab_size)])
    writer.add_array("tokenizer.ggml.scores", [float(i) for i in range(config.vocab_size)])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    for key, (value, value_type) in metadata.items():
        writer.add_key_value(f"{architecture}.{key.replace('__', '.')}", value, value_type)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        stored_type = tensor_type if values.ndim == 2 else Type.F32
        stored = gguf.quantize(values, stored_type)
        parameter.data = torch.from_numpy(gguf.dequantize(stored, stored_type).copy())
        head_count = heads.get(name.split(".")[-2])
        if architecture == "llama" and head_count is not None:
            halves = stored.reshape(head_count, 2, -1, *stored.shape[1:])
            stored = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(stored.shape)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=stored_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    tmp_path: Path,
    save_model: Callable,
    sequences: list[list[int]],
    logits_over_paged_cache: Callable,
    transformers_logits: Callable,
) -> None:
    _, reference = save_model(model_type, **SIZES, **config)
    write_gguf(tmp_path / "model.gguf", reference, model_type, tensor_type)
    model = load_model(str(tmp_path / "model.gguf"), "float32")
    assert isinstance(model, Decoder)
    found = logits_over_paged_cache(model, sequences)
    for logits, expected in zip(found, transformers_logits(reference, sequences), strict=True):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_rotary_scaling_and_window(
    tmp_path: Path,
    save_model: Callable,
    sequences: list[list[int]],
    logits_over_paged_cache: Callable,
    transformers_logits: Callable,
) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    _, reference = save_model("mistral", **SIZES, rope_parameters=rope, sliding_window=6, head_dim=16)
    write_gguf(
        tmp_path / "model.gguf",
        reference,
        "llama",
        Type.F32,
        rope__scaling__type=("linear", gguf.GGUFValueType.STRING),
        rope__scaling__factor=(4.0, gguf.GGUFValueType.FLOAT32),
        attention__sliding_window=(6, gguf.GGUFValueType.UINT32),
    )
    found = logits_over_paged_cache(load_model(str(tmp_path / "model.gguf"), "float32"), sequences)
    for logits, expected in zip(found, transformers_logits(reference, sequences), strict=True):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_header_reader_agrees_with_the_library(tmp_path: Path, save_model: Callable) -> None:
    _, reference = save_model("llama", **SIZES)
    write_gguf(tmp_path / "model.gguf", reference, "llama", Type.Q8_0)
    file, whole = GgufFile(tmp_path / "model.gguf"), gguf.GGUFReader(tmp_path / "model.gguf")
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
    with pytest.raises(ModelError, match="GGUF architecture 'mamba' is not one of llama, qwen2, qwen3"):
        load_model(str(tmp_path / "model.gguf"))


def test_unknown_rotary_scaling_is_refused(tmp_path: Path, save_model: Callable) -> None:
    _, reference = save_model("llama", **SIZES)
    scaling = ("longrope", gguf.GGUFValueType.STRING)
    write_gguf(tmp_path / "model.gguf", reference, "llama", Type.F32, rope__scaling__type=scaling)
    with pytest.raises(ModelError, match="rotary scaling of type 'longrope'"):
        load_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("content", [b"", b"no GGUF file at all", b"GGUF\x03\x00\x00\x00\x05"])
def test_broken_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        load_model(str(path))


def test_cut_off_file_is_refused(tmp_path: Path, save_model: Callable) -> None:
    _, reference = save_model("llama", **SIZES)
    path = tmp_path / "model.gguf"
    write_gguf(path, reference, "llama", Type.F32)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        load_model(str(path))
