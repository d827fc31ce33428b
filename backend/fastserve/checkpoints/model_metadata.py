"""What a checkpoint says of its model, other than weights: end tokens, vocabulary size, context length.

Imports no torch, and transformers only for the context length: processes that only tokenize ask here too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastserve.checkpoints.gguf_file import GgufFile
from fastserve.checkpoints.gguf_rope import rope_parameters
from fastserve.checkpoints.lfs_pointer import refuse_lfs_pointer
from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.safetensors_files import tensor_shapes
from fastserve.checkpoints.transformers_config import read_transformers_config

_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
"""What models call the module that embeds token ids."""
_GGUF_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def eos_token_ids(checkpoint: Path) -> list[int]:
    """The tokens that end an answer, in ascending order.

    Those of `generation_config.json`, or of `config.json` where it has none, and the tokenizer's own.
    Raises ModelError if one of these files cannot be read.
    """
    if checkpoint.is_file():
        file = GgufFile(checkpoint)
        found = (file.value(f"tokenizer.ggml.{key}") for key in _GGUF_EOS_KEYS)
        return sorted({token for token in found if token is not None})
    config = _read_json(checkpoint / "config.json")
    named = (
        _as_list(_read_json(checkpoint / "generation_config.json").get("eos_token_id"))
        or _as_list(config.get("eos_token_id"))
        or _as_list(config.get("text_config", {}).get("eos_token_id"))
    )
    return sorted({*named, *_tokenizer_eos(checkpoint)})


def model_vocab_size(checkpoint: Path) -> int:
    """How many token ids the model has: its embedding's rows. An id from here on is none of its tokens, even
    where its tokenizer has one: fine-tuning often adds a token to the tokenizer alone.

    Raises ModelError if the checkpoint does not say, or says two things.
    """
    return _gguf_vocab_size(checkpoint) if checkpoint.is_file() else _directory_vocab_size(checkpoint)


def context_length(checkpoint: Path) -> int:
    """Tokens of the longest sequence that the model can be served with.

    Raises ModelError if the checkpoint does not say.
    """
    if checkpoint.is_file():
        file = GgufFile(checkpoint)
        length, rope = file.value(f"{file.architecture}.context_length"), rope_parameters(file)
    else:
        config = read_transformers_config(checkpoint).get_text_config()
        length = getattr(config, "max_position_embeddings", None)
        rope = getattr(config, "rope_parameters", None) or {}
    if length is None:
        raise ModelError(f"{checkpoint}: it does not say how long a sequence may be")
    return _scaled_length(length, rope)


def _gguf_vocab_size(path: Path) -> int:
    file = GgufFile(path)
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{path}: it has no token_embd.weight, which embeds the tokens")
    return file.vocab_size


def _directory_vocab_size(directory: Path) -> int:
    config = _read_json(directory / "config.json")
    stated = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    embeddings = {
        name: shape[0]
        for name, shape in tensor_shapes(directory).items()
        if len(shape) == 2 and f".{name}".endswith(tuple(f".{module}.weight" for module in _EMBEDDINGS))
    }
    differing = {name: rows for name, rows in embeddings.items() if rows != stated}
    if stated is None and len(set(embeddings.values())) == 1:
        return next(iter(embeddings.values()))
    if stated is None or differing:
        found = ", ".join(f"{name} has {rows} rows" for name, rows in differing.items())
        raise ModelError(
            f"{directory}: config.json's vocab_size is {stated}, but {found or 'no tensor embeds tokens'}"
        )
    return int(stated)


def _scaled_length(length: int, rope: Mapping[str, Any]) -> int:
    """The context length of a model whose config says `length`, as `rope_parameters` scale it.

    Linear scaling and YaRN (arXiv 2309.00071) lengthen the original context by their factor. A config may
    have either the original or the lengthened one as max_position_embeddings: the two agree where it also
    says the original, and where it does not, max_position_embeddings is that, as transformers documents it.

    With LongRoPE (arXiv 2402.13753) it is the length up to which the frequencies stay the same: beyond it
    they follow the longest sequence of the batch, and one request would alter another's answer.
    """
    original = rope.get("original_max_position_embeddings") or length
    if rope.get("rope_type") == "longrope":
        return min(length, original)
    if rope.get("rope_type") in ("linear", "yarn"):
        return max(length, int(original * (rope.get("factor") or 1)))
    return length


def _tokenizer_eos(directory: Path) -> list[int]:
    """The end token that `tokenizer_config.json` names, as `tokenizer.json` numbers it."""
    named = _read_json(directory / "tokenizer_config.json").get("eos_token")
    name = named["content"] if isinstance(named, dict) else named
    if name is None or not (directory / "tokenizer.json").is_file():
        return []
    refuse_lfs_pointer(directory / "tokenizer.json")
    from tokenizers import Tokenizer

    token = Tokenizer.from_file(str(directory / "tokenizer.json")).token_to_id(name)
    return [] if token is None else [token]


def _read_json(path: Path) -> dict[str, Any]:
    """The object in the file; an empty one if there is no such file."""
    if not path.is_file():
        return {}
    refuse_lfs_pointer(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: {error}") from error


def _as_list(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
