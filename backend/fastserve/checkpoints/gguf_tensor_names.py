"""The mapping of tensor names between llama.cpp and transformers, both ways."""

from __future__ import annotations

import re
from collections.abc import Iterable

import gguf

from fastserve.checkpoints.gguf_file import GgufFile
from fastserve.checkpoints.gguf_rope import LONG_FACTORS, SHORT_FACTORS
from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.tensor_problems import tensor_problems

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
"""The modules of our decoder, by llama.cpp's name."""


def transformers_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; an unknown name stays as it is."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _MODULES:
        return name
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{_MODULES[match[2]]}.{match[3]}"


def gguf_names(file: GgufFile, num_layers: int, names: Iterable[str]) -> dict[str, str]:
    """llama.cpp's name of each of transformers' `names`, for a model of so many layers.

    Raises ModelError if these are not the tensors of the file; it names those that are missing or too many.
    """
    by_name = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    name_map = gguf.get_tensor_name_map(by_name[file.architecture], num_layers)
    found = {name: name_map.get_name(name, try_suffixes=(".weight", ".bias")) or name for name in names}
    missing = [ours for ours, theirs in found.items() if theirs not in file.tensors]
    unexpected = file.tensors.keys() - found.values() - {SHORT_FACTORS, LONG_FACTORS}
    problems = tensor_problems(missing=sorted(missing), unexpected=sorted(unexpected))
    if problems:
        raise ModelError(f"{file.path}: it does not fit its metadata: {problems}")
    return found
