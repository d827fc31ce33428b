"""A GGUF file as a checkpoint: tensors dequantised or packed as they lie, under the names of transformers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from gguf import ReaderTensor, dequantize
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from fastserve.models.decoder_config import DecoderConfig
from fastserve.models.gguf_blocks import read_blocks
from fastserve.models.gguf_file import GgufFile
from fastserve.models.model_directory import eos_token_ids
from fastserve.models.model_error import ModelError
from fastserve.models.weight_rows import select_rows
from fastserve_kernels.formats import Int4, Int8

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""llama.cpp calls Mistral "llama" too."""

_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_CHUNK_ELEMENTS = 1 << 20
"""Dequantised at a time, so that the float32 values stay in the processor's cache."""


class GgufCheckpoint:
    """A `Checkpoint` in a GGUF file."""

    dtype = torch.bfloat16

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._tensors = {
            transformers_name(name): tensor for name, tensor in file.tensors.items() if name != _ROPE_FACTORS
        }
        self.shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, destination: Tensor) -> None:
        """Writes a tensor into `destination` of the same shape, converted to its dtype."""
        heads = self._interleaved_heads(name)
        if heads is None:
            _dequantize(self._tensors[name], destination)
            return
        interleaved = torch.empty_like(destination)
        _dequantize(self._tensors[name], interleaved)
        pairs = interleaved.view(heads, -1, 2, *destination.shape[1:])
        destination.copy_(pairs.transpose(1, 2).reshape(destination.shape))

    def read_packed(self, name: str, exact: bool) -> Int4 | Int8 | None:
        """A matrix as its blocks hold it; None if they are of a kind that must be dequantised."""
        weight, heads = read_blocks(self._tensors[name], exact), self._interleaved_heads(name)
        if weight is None or heads is None:
            return weight
        return select_rows(weight, torch.arange(weight.out_features).view(heads, -1, 2).mT.flatten())

    def _interleaved_heads(self, name: str) -> int | None:
        """How many heads the rows belong to, if the two halves of each head alternate; None if they do not.

        llama.cpp's Llama rotates neighbours where transformers rotates halves.
        """
        if self._file.architecture != "llama":
            return None
        heads = self._file.value("llama.attention.head_count")
        if ".q_proj." in name:
            return heads
        return self._file.value("llama.attention.head_count_kv", heads) if ".k_proj." in name else None


def transformers_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; an unknown name stays as it is."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _MODULES:
        return name
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{_MODULES[match[2]]}.{match[3]}"


def gguf_transformers_config(file: GgufFile) -> PretrainedConfig:
    """The config with which transformers would describe the model of a GGUF file.

    Raises ModelError for another architecture, and for rotary embeddings that it cannot describe.
    """
    if _ROPE_FACTORS in file.tensors:
        raise ModelError(
            f"{file.path}: its rotary frequencies are scaled one by one; give the model's directory"
        )
    return _transformers_config(file)


def gguf_decoder_config(file: GgufFile) -> DecoderConfig:
    """The config that the metadata of a GGUF file describes.

    Raises ModelError for another architecture, and for rotary embeddings that we do not have.
    """
    config = DecoderConfig.from_transformers(_transformers_config(file))
    if _ROPE_FACTORS not in file.tensors:
        return config
    # Llama 3's scaling of the frequencies comes as divisors, computed when the file was made.
    divisors = file.tensors[_ROPE_FACTORS].data.tolist()
    frequencies = zip(config.inverse_frequencies, divisors, strict=True)
    return replace(
        config, inverse_frequencies=tuple(frequency / divisor for frequency, divisor in frequencies)
    )


def _transformers_config(file: GgufFile) -> PretrainedConfig:
    architecture = file.architecture
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"{file.path}: GGUF architecture {architecture!r} is not one of {known}")

    def value(key: str, default: Any = None) -> Any:
        found = file.value(f"{architecture}.{key}", default)
        if found is None:
            raise ModelError(f"{file.path}: the metadata has no {architecture}.{key}")
        return found

    heads, hidden = value("attention.head_count"), value("embedding_length")
    window = file.value(f"{architecture}.attention.sliding_window")
    return AutoConfig.for_model(
        "mistral" if window is not None and architecture == "llama" else architecture,
        vocab_size=int(file.tensors["token_embd.weight"].shape[1]),
        hidden_size=hidden,
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=value("attention.head_count_kv", heads),
        head_dim=value("attention.key_length", hidden // heads),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=value("context_length"),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_output.bias" in file.tensors,
        sliding_window=window,
        bos_token_id=file.value("tokenizer.ggml.bos_token_id"),
        eos_token_id=eos_token_ids(file.path),
        rope_parameters=_rope_parameters(file),
    )


def _rope_parameters(file: GgufFile) -> dict[str, object]:
    """transformers' description of the rotary embedding. Raises ModelError for an unknown scaling."""

    def value(key: str, default: object = None) -> object:
        return file.value(f"{file.architecture}.rope.{key}", default)

    rope: dict[str, object] = {"rope_type": "default", "rope_theta": value("freq_base", 10000.0)}
    scaling = value("scaling.type", "none")
    if scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": value("scaling.factor", 1.0)}
    elif scaling != "none":
        raise ModelError(f"{file.path}: rotary scaling of type {scaling!r} is not one of none, linear, yarn")
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = value("scaling.original_context_length")
    return rope


def _dequantize(tensor: ReaderTensor, destination: Tensor) -> None:
    """Writes the values of a tensor into `destination`, some rows at a time."""
    data = tensor.data.reshape(destination.shape[0], -1)
    rows = max(1, _CHUNK_ELEMENTS * destination.shape[0] // destination.numel())
    for start in range(0, destination.shape[0], rows):
        target = destination[start : start + rows]
        values = dequantize(data[start : start + rows], tensor.tensor_type)
        target.copy_(torch.from_numpy(values).view(target.shape))
