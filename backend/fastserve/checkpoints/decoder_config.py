"""The shape of a decoder of the Llama family, taken from a transformers config.

The family: RMS norm before attention and before a SwiGLU MLP, rotary positions, grouped-query attention.
Llama, Mistral, Qwen2 and Qwen3 differ only in biases, in a norm of queries and keys, and in sliding windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastserve.checkpoints.model_error import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    AnyConfig = PretrainedConfig | SimpleNamespace
    """One of transformers, or another object with its attributes, as far as they are asked for here."""

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""The scalings whose frequencies depend on nothing but the config."""
QUANT_METHODS = ("compressed-tensors", "gptq", "awq", "fastserve")
"""The quantization methods whose layouts of weights are read."""


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes (in elements) and options that tell decoders of the family apart."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_proj_bias: bool
    """Whether the projection after attention (`o_proj`) has a bias."""
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    """The window of each layer in tokens; None: the layer attends to everything before."""
    inv_freq: tuple[float, ...]
    """The head_dim / 2 inverse frequencies of the rotary embedding (theta_i of arXiv 2104.09864), scaled to
    the context."""
    attention_scaling: float
    """The factor of cosine and sine (the attention factor of YaRN, arXiv 2309.00071); 1 without scaling."""

    @property
    def num_layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.sliding_windows)

    @classmethod
    def from_transformers(cls, config: AnyConfig) -> DecoderConfig:
        """The shape that a config of transformers describes. Raises ModelError, with `unsupported_reason`."""
        reason = unsupported_reason(config)
        if reason is not None:
            raise ModelError(f"not a decoder of the Llama family as FastServe has it: {reason}")
        inv_freq, attention_scaling = _rotary_parameters(config)
        attention_bias = getattr(config, "attention_bias", False)
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=_head_dim(config),
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            qkv_bias=attention_bias or config.model_type == "qwen2",
            o_proj_bias=attention_bias,
            mlp_bias=getattr(config, "mlp_bias", False),
            qk_norm=config.model_type == "qwen3",
            sliding_windows=_sliding_windows(config),
            inv_freq=tuple(inv_freq.tolist()),
            attention_scaling=attention_scaling,
        )

    def rotary_tables(self, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine [length, head_dim] of every position, computed in float32 as transformers does."""
        inv_freq = torch.tensor(self.inv_freq, dtype=torch.float32, device=device)
        positions = torch.arange(length, dtype=torch.float32, device=device)
        angles = torch.outer(positions, inv_freq).repeat(1, 2)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(dtype), sin.to(dtype)


def unsupported_reason(config: AnyConfig) -> str | None:
    """Why our decoder cannot compute this model, or None if it can, as far as its config tells."""
    if config.model_type not in MODEL_TYPES:
        return f"its model_type is {config.model_type!r}, not one of {', '.join(MODEL_TYPES)}"
    if config.hidden_act != "silu":
        return f"its hidden_act is {config.hidden_act!r}, not 'silu'"
    rope = config.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES:
        return f"its rope_type is {rope['rope_type']!r}, not one of {', '.join(ROPE_TYPES)}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "only a part of each head is rotated"
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        return f"it has layers of type {', '.join(sorted(unknown))}"
    method = quant_method(config)
    if method is not None and method not in QUANT_METHODS:
        return f"its quant_method is {method!r}, not one of {', '.join(QUANT_METHODS)}"
    return None


def quant_method(config: AnyConfig) -> str | None:
    """The `quant_method` of the config's `quantization_config`; None if the weights are not quantized."""
    quantization = getattr(config, "quantization_config", None)
    return None if quantization is None else str(quantization.get("quant_method"))


def _head_dim(config: AnyConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _sliding_windows(config: AnyConfig) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return (window,) * config.num_hidden_layers
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)


def _rotary_parameters(config: AnyConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] float32, and the factor of cosine and sine."""
    rope_type = config.rope_parameters["rope_type"]
    if rope_type != "default":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        return ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    dim = _head_dim(config)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0
