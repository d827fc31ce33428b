"""What sentence-transformers' own files say of a model: `modules.json`, and those that it names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastserve.checkpoints.lfs_pointer import refuse_lfs_pointer
from fastserve.checkpoints.model_error import ModelError
from fastserve.encoders.pooling import MODES

MODULES = "modules.json"
OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The mode that a true field of `1_Pooling/config.json` asks for; newer files name the mode itself."""
DENSE_ACTIVATIONS = ("Tanh", "Identity", "ReLU", "GELU")
"""Classes of torch.nn that a dense module may name as its activation."""


@dataclass(frozen=True)
class DenseModule:
    """A linear layer behind the pooling."""

    directory: Path
    in_features: int
    out_features: int
    has_bias: bool
    activation: str
    """One of `DENSE_ACTIVATIONS`."""


@dataclass(frozen=True)
class SentenceTransformer:
    """How a text becomes an embedding."""

    directory: Path
    """The transformer's files: its config, weights and tokenizer."""
    max_length: int | None = None
    """Tokens of a text, at most; None: as many as the model takes."""
    do_lower_case: bool = False
    pooling: tuple[str, ...] = ("mean",)
    """Of `pooling.MODES`; several are one vector, one behind the other."""
    dense: tuple[DenseModule, ...] = ()
    normalize: bool = False
    """Embeddings have length 1."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """What is written before a text, by a name: "query", "document"."""
    default_prompt: str | None = None
    """The name of the prompt of texts whose request names none."""


def read_sentence_transformer(directory: Path) -> SentenceTransformer | None:
    """None where the directory has no `modules.json`. Raises ModelError for what is not computed here."""
    if not (directory / MODULES).is_file():
        return None
    found = SentenceTransformer(directory)
    for module in _read(directory / MODULES, list):
        kind = _field(directory / MODULES, module, "type", str).rpartition(".")[2]
        reader = _READERS.get(kind)
        if reader is None:
            raise ModelError(f"{directory / MODULES}: got a module {kind!r}; allowed: {', '.join(_READERS)}")
        found = reader(found, directory / _field(directory / MODULES, module, "path", str))
    return _with_prompts(found, directory / "config_sentence_transformers.json")


def _transformer(found: SentenceTransformer, directory: Path) -> SentenceTransformer:
    path = directory / "sentence_bert_config.json"
    config = _read(path, dict) if path.is_file() else {}
    max_length = config.get("max_seq_length")
    if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
        raise ModelError(f"{path}: max_seq_length: got {max_length!r}; allowed: a positive integer")
    return replace(
        found,
        directory=directory,
        max_length=max_length,
        do_lower_case=_field(path, config, "do_lower_case", bool, False),
    )


def _pooling(found: SentenceTransformer, directory: Path) -> SentenceTransformer:
    path = directory / "config.json"
    config = _read(path, dict)
    if not _field(path, config, "include_prompt", bool, True):
        raise ModelError(f"{path}: include_prompt: got False; allowed: True")
    if "pooling_mode" in config:
        named = config["pooling_mode"]
        modes = tuple(named) if isinstance(named, list) else (named,)
    else:
        modes = tuple(mode for name, mode in OLD_POOLING.items() if config.get(name))
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise ModelError(
            f"{path}: pooling_mode: got {unknown[0] if unknown else None!r}; allowed: {', '.join(MODES)}"
        )
    return replace(found, pooling=modes)


def _dense(found: SentenceTransformer, directory: Path) -> SentenceTransformer:
    if found.normalize:
        raise ModelError(f"{directory}: got a module Dense behind Normalize; allowed: before it")
    path = directory / "config.json"
    config = _read(path, dict)
    activation = _field(path, config, "activation_function", str, "Tanh").rpartition(".")[2]
    if activation not in DENSE_ACTIVATIONS:
        raise ModelError(
            f"{path}: activation_function: got {activation!r}; allowed: {', '.join(DENSE_ACTIVATIONS)}"
        )
    module = DenseModule(
        directory,
        _field(path, config, "in_features", int),
        _field(path, config, "out_features", int),
        _field(path, config, "bias", bool, True),
        activation,
    )
    return replace(found, dense=(*found.dense, module))


def _normalize(found: SentenceTransformer, directory: Path) -> SentenceTransformer:
    return replace(found, normalize=True)


_READERS: Mapping[str, Callable[[SentenceTransformer, Path], SentenceTransformer]] = {
    "Transformer": _transformer,
    "Pooling": _pooling,
    "Dense": _dense,
    "Normalize": _normalize,
}
"""By the last word of a module's type."""


def _with_prompts(found: SentenceTransformer, path: Path) -> SentenceTransformer:
    config = _read(path, dict) if path.is_file() else {}
    prompts = _field(path, config, "prompts", dict, {})
    default = config.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ModelError(
            f"{path}: default_prompt_name: got {default!r}; allowed: {', '.join(prompts) or 'null'}"
        )
    return replace(found, prompts=prompts, default_prompt=default)


def _read(path: Path, kind: type) -> Any:
    refuse_lfs_pointer(path)
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(found, kind):
        raise ModelError(f"{path}: got a {type(found).__name__}; allowed: a {kind.__name__}")
    return found


def _field(path: Path, config: Any, name: str, kind: type, *default: Any) -> Any:
    """The field of a JSON object; `default` where there is none, if one is given."""
    value = config.get(name, *default) if isinstance(config, dict) else None
    if not isinstance(value, kind):
        raise ModelError(f"{path}: {name}: got {value!r}; allowed: a {kind.__name__}")
    return value
