"""The rotary embedding that the metadata of a GGUF file describes, in transformers' words.

Imports no torch. The meaning of each key, and what holds where it is missing, is llama.cpp's.
"""

from __future__ import annotations

import math
from typing import Any

from fastserve.checkpoints.gguf_file import GgufFile
from fastserve.checkpoints.model_error import ModelError

_GEMMA3_LOCAL_THETA = 10000.0
"""The base of the frequencies in layers with a sliding window, where the file does not say."""
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
"""The tensors of LongRoPE (arXiv 2402.13753): divisors of the frequencies, float32 [head_dim / 2] each."""
ROPE_FREQS = "rope_freqs.weight"
"""The tensor of Llama 3's scaling: divisors of the frequencies, float32 [head_dim / 2]."""
_TYPES = ("none", "linear", "yarn")


def rope_parameters(file: GgufFile) -> dict[str, Any]:
    """`rope_parameters` of transformers' config. Raises ModelError for a scaling that we do not compute."""
    if file.architecture != "gemma3":
        return _rope_parameters(file)
    local = file.value("gemma3.rope.freq_base_swa", _GEMMA3_LOCAL_THETA)
    return {
        "full_attention": _rope_parameters(file),
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


def _rope_parameters(file: GgufFile) -> dict[str, Any]:
    def value(key: str, default: Any = None) -> Any:
        return file.architecture_value(f"rope.{key}", default)

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": value("freq_base", 10000.0)}
    factor = value("scaling.factor", value("scale_linear", 0.0)) or 1.0
    scaling = value("scaling.type", "linear" if factor != 1.0 else "none")
    if SHORT_FACTORS in file.tensors:
        rope |= {"rope_type": "longrope", **_longrope(file)}
    elif scaling not in _TYPES:
        raise ModelError(f"{file.path}: rotary scaling of type {scaling!r} is not one of {', '.join(_TYPES)}")
    elif scaling == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor, **_yarn(file, factor)}
    elif scaling == "linear" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    part = value("dimension_count", file.head_dim) / file.head_dim
    return rope if part == 1.0 else rope | {"partial_rotary_factor": part}


def _yarn(file: GgufFile, factor: float) -> dict[str, Any]:
    """What YaRN (arXiv 2309.00071) has beside its factor."""

    def value(key: str, default: Any) -> Any:
        return file.architecture_value(f"rope.scaling.{key}", default)

    for key, only in (("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        if value(key, only) != only:
            name = f"{file.architecture}.rope.scaling.{key}"
            raise ModelError(f"{file.path}: {name}: got {value(key, only)}; allowed: {only}")
    length = file.required_value("context_length")
    return {
        "original_max_position_embeddings": value("original_context_length", length),
        "beta_fast": value("yarn_beta_fast", 32.0),
        "beta_slow": value("yarn_beta_slow", 1.0),
        "attention_factor": value("attn_factor", 1.0) * (1.0 + 0.1 * math.log(factor)),
    }


def _longrope(file: GgufFile) -> dict[str, Any]:
    """What LongRoPE (arXiv 2402.13753) has: the factors are tensors, whatever the type of scaling says."""
    rope = {
        "short_factor": file.tensors[SHORT_FACTORS].data.tolist(),
        "long_factor": file.tensors[LONG_FACTORS].data.tolist(),
        "original_max_position_embeddings": file.required_value("rope.scaling.original_context_length"),
    }
    scale = file.architecture_value("rope.scaling.attn_factor")
    return rope if scale is None else rope | {"attention_factor": scale}
