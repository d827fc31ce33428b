"""A GGUF file as a checkpoint: tensors dequantized or packed as they lie, under the names of transformers."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fastserve.checkpoints.decoder_config import DecoderConfig
from fastserve.checkpoints.gguf_architectures import ARCHITECTURES, DECODERS, transformers_config
from fastserve.checkpoints.gguf_blocks import read_blocks
from fastserve.checkpoints.gguf_file import GgufFile
from fastserve.checkpoints.gguf_tensor import deinterleave, dequantize_into
from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.weight_rows import select_rows
from fastserve_kernels.formats import Int4, Int8

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
            dequantize_into(self._tensors[name], destination)
            return
        interleaved = torch.empty_like(destination)
        dequantize_into(self._tensors[name], interleaved)
        destination.copy_(deinterleave(interleaved, heads))

    def read_packed(self, name: str, exact: bool) -> Int4 | Int8 | None:
        """A matrix as its blocks hold it; None if they are of a kind that must be dequantized."""
        weight, heads = read_blocks(self._tensors[name], exact), self._interleaved_heads(name)
        if weight is None or heads is None:
            return weight
        return select_rows(weight, torch.arange(weight.out_features).view(heads, -1, 2).mT.flatten())

    def _interleaved_heads(self, name: str) -> int | None:
        """How many heads the rows belong to, if the two halves of each head alternate; None if they do not.

        llama.cpp's Llama rotates neighbours where transformers rotates halves.
        """
        if not ARCHITECTURES[self._file.architecture].interleaved:
            return None
        heads = self._file.required("attention.head_count")
        if ".q_proj." in name:
            return heads
        groups = self._file.value(f"{self._file.architecture}.attention.head_count_kv", heads)
        return groups if ".k_proj." in name else None


def transformers_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; an unknown name stays as it is."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _MODULES:
        return name
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{_MODULES[match[2]]}.{match[3]}"


def gguf_transformers_config(file: GgufFile) -> PretrainedConfig:
    """The config of transformers for the tensors of a `GgufCheckpoint`.

    Raises ModelError for an architecture that our decoder has not, and for rotary embeddings that
    transformers cannot describe.
    """
    if file.architecture not in DECODERS:
        known = ", ".join(DECODERS)
        raise ModelError(f"{file.path}: GGUF architecture {file.architecture!r} is not one of {known}")
    if _ROPE_FACTORS in file.tensors:
        raise ModelError(
            f"{file.path}: its rotary frequencies are scaled one by one; give the model's directory"
        )
    return transformers_config(file)


def gguf_decoder_config(file: GgufFile) -> DecoderConfig:
    """The config that the metadata of a GGUF file describes.

    Raises ModelError for another architecture, and for rotary embeddings that we do not have.
    """
    config = DecoderConfig.from_transformers(transformers_config(file))
    if _ROPE_FACTORS not in file.tensors:
        return config
    # Llama 3's scaling of the frequencies comes as divisors, computed when the file was made.
    divisors = file.tensors[_ROPE_FACTORS].data.tolist()
    frequencies = zip(config.inv_freq, divisors, strict=True)
    return replace(config, inv_freq=tuple(frequency / divisor for frequency, divisor in frequencies))
