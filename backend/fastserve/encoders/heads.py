"""What stands behind an encoder's body: h -> h W^T + b, for a sequence or for each of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fastserve.checkpoints.model_error import ModelError
from fastserve.encoders.encoder_checkpoint import Shapes
from fastserve.encoders.encoder_config import EncoderConfig
from fastserve.encoders.encoder_loader import EncoderLoader, linear_shapes, norm_shapes
from fastserve.encoders.encoder_model import ACTIVATION_FUNCTIONS, LayerNorm
from fastserve.encoders.pooling import pool
from fastserve.encoders.ragged_batch import RaggedBatch
from fastserve.models.linear import AnyLinear

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HeadKind = Literal["sequence", "token"]


class Head(Protocol):
    """Turns hidden states into the scores of labels."""

    def __call__(self, hidden: Tensor, batch: RaggedBatch) -> Tensor:
        """The logits [B, labels] or [T, labels] float32 of hidden states [T, hidden]."""


@dataclass(frozen=True)
class ClassificationHead:
    """A `Head` of our encoder."""

    kind: HeadKind
    pooling: Sequence[str]
    """Of a sequence's tokens; see `pooling.MODES`."""
    dense: AnyLinear | None
    activation: Callable[[Tensor], Tensor]
    norm: LayerNorm | None
    classifier: AnyLinear

    def __call__(self, hidden: Tensor, batch: RaggedBatch) -> Tensor:
        """See `Head`."""
        if self.kind == "sequence":
            hidden = pool(hidden, batch.cu_seqlens, self.pooling).to(hidden.dtype)
        if self.dense is not None:
            hidden = self.activation(self.dense(hidden))
        if self.norm is not None:
            hidden = self.norm(hidden)
        return self.classifier(hidden).float()


@dataclass(frozen=True)
class HeadModules:
    """The modules of a family's head, by name; empty: there is none."""

    dense: str
    has_dense_bias: bool
    norm: str
    classifier: str
    num_labels: int

    def shapes(self, config: EncoderConfig) -> Shapes:
        """The shape of every tensor, by name."""
        shapes = linear_shapes(self.classifier, self.num_labels, config.hidden_size, True)
        if self.dense:
            shapes |= linear_shapes(self.dense, config.hidden_size, config.hidden_size, self.has_dense_bias)
        return shapes | (norm_shapes(config, self.norm) if self.norm else {})


def head_modules(config: EncoderConfig, kind: HeadKind, num_labels: int) -> HeadModules:
    """Those of an encoder of this config."""
    names = config.names
    if kind == "sequence":
        dense, classifier = names.pooler or names.head_dense, names.sequence_classifier
    else:
        dense, classifier = names.token_head_dense, names.token_classifier
    return HeadModules(dense, config.head_bias, names.head_norm if dense else "", classifier, num_labels)


def load_head(loader: EncoderLoader, modules: HeadModules, kind: HeadKind, config: PretrainedConfig) -> Head:
    """The head of these modules; `config` is transformers' of the model."""
    linear = loader.reader.linear
    return ClassificationHead(
        kind=kind,
        pooling=(_pooling(config),),
        dense=linear(modules.has_dense_bias, modules.dense) if modules.dense else None,
        activation=_activation(config),
        norm=loader.norm(modules.norm) if modules.norm else None,
        classifier=linear(True, modules.classifier),
    )


def _pooling(config: PretrainedConfig) -> str:
    pooling = getattr(config, "classifier_pooling", "cls")
    if pooling not in ("cls", "mean"):
        raise ModelError(f"classifier_pooling: got {pooling!r}; allowed: cls, mean")
    return pooling


def _activation(config: PretrainedConfig) -> Callable[[Tensor], Tensor]:
    """What transformers has in each family's head."""
    if config.model_type == "distilbert":
        return functional.relu
    if config.model_type == "modernbert":
        return ACTIVATION_FUNCTIONS[config.classifier_activation]
    return torch.tanh
