"""What a checkpoint is for, and how its labels' scores are answered: from its config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastserve.checkpoints.decoder_config import unsupported_reason
from fastserve.checkpoints.model_error import ModelError
from fastserve.encoders.heads import HeadKind

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Task = Literal["embed", "classify", "rerank"]
Activation = Literal["softmax", "sigmoid", "identity"]

_PAIR_ACTIVATIONS: dict[str, Activation] = {"Sigmoid": "sigmoid", "Identity": "identity"}
"""By the class of torch.nn that a cross-encoder's config names."""


def task_of(directory: Path, config: PretrainedConfig, has_recipe: bool) -> Task:
    """The task of a model; `has_recipe`: sentence-transformers' files say how it embeds.

    A classifier of sequences with one label is a cross-encoder. Raises ModelError where the files do not say.
    """
    if has_recipe:
        return "embed"
    kind = _head_kind(config)
    if kind is not None:
        return "rerank" if kind == "sequence" and config.num_labels == 1 else "classify"
    if unsupported_reason(config) is None:
        raise ModelError(
            f"{directory}: a decoder ({config.model_type!r}) without modules.json, which says how it embeds; "
            "allowed: a directory as sentence-transformers saves it"
        )
    return "embed"


def head_kind_of(task: Task, config: PretrainedConfig) -> HeadKind | None:
    """The head that the task needs; None: it needs hidden states."""
    return None if task == "embed" else _head_kind(config)


def _head_kind(config: PretrainedConfig) -> HeadKind | None:
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        return "sequence"
    return "token" if architecture.endswith("ForTokenClassification") else None


def activation_of(task: Task, config: PretrainedConfig) -> Activation:
    """How the scores of labels become those of the answer.

    A cross-encoder's is what sentence-transformers wrote into its config, the sigmoid by default; labels of
    which several hold at once have a sigmoid each; all others are softmax(h W^T + b).
    """
    if task == "rerank":
        return _pair_activation(config)
    is_multi_label = getattr(config, "problem_type", None) == "multi_label_classification"
    return "sigmoid" if task == "classify" and is_multi_label else "softmax"


def _pair_activation(config: PretrainedConfig) -> Activation:
    written: Any = getattr(config, "sentence_transformers", None) or {}
    name = written.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None)
    kind = (name or "Sigmoid").rpartition(".")[2]
    if kind not in _PAIR_ACTIVATIONS:
        raise ModelError(f"activation_fn: got {name!r}; allowed: {', '.join(_PAIR_ACTIVATIONS)}")
    return _PAIR_ACTIVATIONS[kind]
