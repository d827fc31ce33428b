"""The architectures of GGUF files: what each has in its metadata, in the words of transformers' configs.

Where a file is silent, the defaults are llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastserve.checkpoints.gguf_file import GgufFile
from fastserve.checkpoints.gguf_rope import rope_parameters
from fastserve.checkpoints.model_error import ModelError

Fields = dict[str, Any]


@dataclass(frozen=True)
class GgufArchitecture:
    """How the GGUF files of a family of models are read."""

    model_type: str
    """transformers' name of the architecture."""
    norm_field: str
    """The config's name of the epsilon of its norms: RMSNorm if `rms` is in it, else LayerNorm."""
    fields: Callable[[GgufFile], Fields]
    """The fields of the config other than the sizes."""
    interleaved: bool = False
    """Whether the halves of each head of queries and keys alternate: llama.cpp rotates neighbours there."""
    shifted_norms: bool = False
    """Whether the weights of norms are stored plus one."""


def _has(file: GgufFile, tensor: str) -> bool:
    return f"blk.0.{tensor}" in file.tensors


def _layer_types(file: GgufFile, period: int) -> list[str]:
    """The layers as the file lists them, else with every `period`-th attending to everything, the others to a
    window."""
    layers = range(file.required_value("block_count"))
    pattern = file.architecture_value("attention.sliding_window_pattern", period)
    is_windowed = pattern if isinstance(pattern, list) else [bool((i + 1) % pattern) for i in layers]
    return ["sliding_attention" if is_windowed[i] else "full_attention" for i in layers]


def _query_scale(file: GgufFile, layers_of_27b: int) -> int:
    """`query_pre_attn_scalar`: queries are divided by its square root. No file says it; models of 27B are the
    exception to head_dim."""
    if file.required_value("block_count") == layers_of_27b:
        return file.required_value("embedding_length") // file.required_value("attention.head_count")
    return file.head_dim


def _none(file: GgufFile) -> Fields:
    return {}


def _llama(file: GgufFile) -> Fields:
    window = file.architecture_value("attention.sliding_window")
    model_type = "llama" if window is None else "mistral"
    return _biases(file) | {"model_type": model_type, "sliding_window": window}


def _qwen(file: GgufFile) -> Fields:
    return {"attention_bias": _has(file, "attn_output.bias"), "sliding_window": None}


def _gemma2(file: GgufFile) -> Fields:
    return {
        "sliding_window": file.architecture_value("attention.sliding_window", 4096),
        "layer_types": _layer_types(file, period=2),
        "query_pre_attn_scalar": _query_scale(file, layers_of_27b=46),
        "attn_logit_softcapping": file.architecture_value("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": file.architecture_value("final_logit_softcapping", 30.0),
    }


def _gemma3(file: GgufFile) -> Fields:
    return {
        "sliding_window": file.architecture_value("attention.sliding_window"),
        "layer_types": _layer_types(file, period=6),
        "query_pre_attn_scalar": _query_scale(file, layers_of_27b=62),
        "final_logit_softcapping": file.architecture_value("final_logit_softcapping"),
    }


def _phi3(file: GgufFile) -> Fields:
    rope = rope_parameters(file)
    length = file.required_value("context_length")
    return {
        "sliding_window": file.architecture_value("attention.sliding_window") or None,
        "rope_parameters": {"partial_rotary_factor": 1.0} | rope,
        "original_max_position_embeddings": rope.get("original_max_position_embeddings", length),
    }


def _granite(file: GgufFile) -> Fields:
    if not file.architecture_value("rope.scaling.finetuned", True):
        raise ModelError(f"{file.path}: granite.rope.scaling.finetuned: got False; allowed: True")
    return _biases(file) | {
        "logits_scaling": file.required_value("logit_scale"),
        "residual_multiplier": file.architecture_value("residual_scale") or 1.0,
        "embedding_multiplier": file.architecture_value("embedding_scale") or 1.0,
        "attention_multiplier": file.architecture_value("attention.scale") or file.head_dim**-0.5,
    }


def _smollm3(file: GgufFile) -> Fields:
    return _biases(file) | {"no_rope_layer_interval": 4, "use_sliding_window": False}


def _stablelm(file: GgufFile) -> Fields:
    return {
        "use_qkv_bias": _has(file, "attn_q.bias"),
        "qk_layernorm": _has(file, "attn_q_norm.weight"),
        "use_parallel_residual": not _has(file, "ffn_norm.weight"),
        "rope_parameters": {"partial_rotary_factor": 1.0} | rope_parameters(file),
    }


def _starcoder2(file: GgufFile) -> Fields:
    return {"use_bias": _has(file, "attn_q.bias"), "sliding_window": None}


def _biases(file: GgufFile) -> Fields:
    return {"attention_bias": _has(file, "attn_output.bias"), "mlp_bias": _has(file, "ffn_up.bias")}


ARCHITECTURES: dict[str, GgufArchitecture] = {
    "llama": GgufArchitecture("llama", "rms_norm_eps", _llama, interleaved=True),  # Mistral too
    "qwen2": GgufArchitecture("qwen2", "rms_norm_eps", _qwen),
    "qwen3": GgufArchitecture("qwen3", "rms_norm_eps", _qwen),
    "gemma": GgufArchitecture("gemma", "rms_norm_eps", _none, shifted_norms=True),
    "gemma2": GgufArchitecture("gemma2", "rms_norm_eps", _gemma2, shifted_norms=True),
    "gemma3": GgufArchitecture("gemma3_text", "rms_norm_eps", _gemma3, shifted_norms=True),
    "phi3": GgufArchitecture("phi3", "rms_norm_eps", _phi3),
    "granite": GgufArchitecture("granite", "rms_norm_eps", _granite, interleaved=True),
    "smollm3": GgufArchitecture("smollm3", "rms_norm_eps", _smollm3, interleaved=True),
    "stablelm": GgufArchitecture("stablelm", "layer_norm_eps", _stablelm),
    "olmo2": GgufArchitecture("olmo2", "rms_norm_eps", _biases),
    "starcoder2": GgufArchitecture("starcoder2", "norm_epsilon", _starcoder2),
}
"""The architectures by llama.cpp's name."""

DECODERS = ("llama", "qwen2", "qwen3")
"""The architectures that our decoder computes; transformers' own modules compute the others."""
