"""What our encoder must know of a model, read from transformers' config of any family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastserve.checkpoints.model_error import ModelError
from fastserve.encoders.tensor_names import TENSOR_NAMES, TensorNames

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
"""Values of `hidden_act` that are computed here."""
DISTILBERT_EPS = 1e-12
"""Its config has none: transformers writes this number in the model."""
MPNET_PADDING = 1
MPNET_BUCKETS = 32
MPNET_DISTANCE = 128
"""Of the relative positions: transformers writes these three in the model, whatever the config has."""


@dataclass(frozen=True)
class EncoderConfig:
    """The shapes of an encoder, and which of the families' parts it has."""

    names: TensorNames
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    activation: str
    """One of `ACTIVATIONS`."""
    norm_eps: float
    max_length: int
    """Tokens of the longest sequence."""
    num_positions: int = 0
    """Rows of the table of positions; 0: positions are rotary."""
    padding_idx: int | None = None
    """Positions are counted from padding_idx + 1, over the tokens that are not padding (RoBERTa, MPNet)."""
    num_token_types: int = 0
    pre_norm: bool = False
    """A layer's norms come before its parts, the first layer has none before its attention, and the MLP is
    gated (ModernBERT); else they come after the sums."""
    norm_bias: bool = True
    attention_bias: bool = True
    mlp_bias: bool = True
    windows: tuple[int | None, ...] = ()
    """Of each layer, tokens that are seen to each side; None: all."""
    rotary_thetas: tuple[float, ...] = ()
    """Of each layer, where positions are rotary."""
    head_bias: bool = True
    """Of a head's dense layer."""

    @property
    def head_dim(self) -> int:
        """Elements of a head's query."""
        return self.hidden_size // self.num_heads

    @property
    def relative_buckets(self) -> int:
        """Rows of the table of relative positions; 0: there is none."""
        return MPNET_BUCKETS if self.names.relative_bias else 0


def has_own_encoder(config: PretrainedConfig) -> bool:
    """Whether our encoder computes models of this type."""
    return config.model_type in TENSOR_NAMES


def encoder_config(config: PretrainedConfig) -> EncoderConfig:
    """Raises ModelError naming the field where the config asks for what our encoder does not compute."""
    for field, allowed in (("is_decoder", (False, None)), ("add_cross_attention", (False, None))):
        _check(config, field, allowed)
    _check(config, "position_embedding_type", ("absolute", None))
    found = _READERS.get(config.model_type, _bert)(config)
    _allow("hidden_act", found.activation, ACTIVATIONS)
    if found.hidden_size % found.num_heads:
        raise ModelError(
            f"hidden_size: got {found.hidden_size}; allowed: a multiple of num_attention_heads, "
            f"{found.num_heads}"
        )
    return found


def _check(config: PretrainedConfig, field: str, allowed: tuple[Any, ...]) -> None:
    _allow(field, getattr(config, field, None), allowed)


def _allow(field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ModelError(f"{field}: got {value!r}; allowed: {', '.join(map(repr, allowed))}")


def _common(config: PretrainedConfig) -> dict[str, Any]:
    return {
        "names": TENSOR_NAMES[config.model_type],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
    }


def _bert(config: PretrainedConfig) -> EncoderConfig:
    """BERT; and RoBERTa, XLM-R and CamemBERT, whose positions begin behind the padding's."""
    padding = None if config.model_type == "bert" else config.pad_token_id
    return EncoderConfig(
        **_common(config),
        intermediate_size=config.intermediate_size,
        activation=config.hidden_act,
        norm_eps=config.layer_norm_eps,
        max_length=config.max_position_embeddings - (0 if padding is None else padding + 1),
        num_positions=config.max_position_embeddings,
        padding_idx=padding,
        num_token_types=config.type_vocab_size,
    )


def _mpnet(config: PretrainedConfig) -> EncoderConfig:
    _check(config, "relative_attention_num_buckets", (MPNET_BUCKETS,))
    return EncoderConfig(
        **_common(config),
        intermediate_size=config.intermediate_size,
        activation=config.hidden_act,
        norm_eps=config.layer_norm_eps,
        max_length=config.max_position_embeddings - MPNET_PADDING - 1,
        num_positions=config.max_position_embeddings,
        padding_idx=MPNET_PADDING,
    )


def _distilbert(config: PretrainedConfig) -> EncoderConfig:
    return EncoderConfig(
        **_common(config),
        intermediate_size=config.hidden_dim,
        activation=config.activation,
        norm_eps=DISTILBERT_EPS,
        max_length=config.max_position_embeddings,
        num_positions=config.max_position_embeddings,
    )


def _modernbert(config: PretrainedConfig) -> EncoderConfig:
    for kind, rope in config.rope_parameters.items():
        _allow(f"rope_parameters of {kind}: rope_type", rope["rope_type"], ("default",))
    _check(config, "classifier_activation", ACTIVATIONS)
    _check(config, "classifier_activation", (config.hidden_activation,))
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    return EncoderConfig(
        **_common(config),
        intermediate_size=config.intermediate_size,
        activation=config.hidden_activation,
        norm_eps=config.norm_eps,
        max_length=config.max_position_embeddings,
        pre_norm=True,
        norm_bias=config.norm_bias,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        windows=tuple(windows[kind] for kind in config.layer_types),
        rotary_thetas=tuple(float(config.rope_parameters[kind]["rope_theta"]) for kind in config.layer_types),
        head_bias=config.classifier_bias,
    )


_READERS: Mapping[str, Callable[[PretrainedConfig], EncoderConfig]] = {
    "distilbert": _distilbert,
    "mpnet": _mpnet,
    "modernbert": _modernbert,
}
