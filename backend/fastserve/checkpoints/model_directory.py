"""Where a model's files are: its weights, its tokenizer, and the tokens that end an answer.

Imports no torch: a process that only tokenizes uses it too.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.cache_directory import cache_path
from fastserve.checkpoints.gguf_file import GgufFile
from fastserve.checkpoints.gguf_rope import rope_parameters
from fastserve.checkpoints.lfs_pointer import refuse_lfs_pointer
from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.safetensors_files import tensor_shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_CONVERSION = 2
"""Counts what `gguf_tokenizer` makes of a file: a tokenizer in the cache is used only by the same."""
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
"""What models call the module that embeds token ids."""
_GGUF_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")


def resolve_model_path(model: str) -> Path:
    """The GGUF file or the directory of a model: a path, or the name of a model of the hub, which is fetched.

    Raises ModelError.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ModelError(
            f"{model}: no such file or directory, and not the name of a model of the hub (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{model}: not on this machine, and the hub cannot be reached. Fetch it where there is a network "
            f"(`hf download {model}`), then give its directory"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelError(f"{model}: the hub refused it: {error}") from error


def resolve_tokenizer_directory(model: str | Path) -> Path:
    """The directory with the tokenizer's files: `tokenizer.json`, its config, its chat template.

    For a directory it is that directory. The tokenizer of a GGUF file is converted once, in seconds, and kept
    in the user's cache under a digest of all that it is made of. Raises ModelError.
    """
    path = resolve_model_path(str(model))
    if path.is_dir():
        refuse_lfs_pointer(path / "tokenizer.json")
        return path
    made_by = f"{_CONVERSION}-transformers-{version('transformers')}"
    directory = cache_path(f"tokenizers/{GgufFile(path).header_digest()[:32]}-{made_by}")
    if not directory.is_dir():
        _convert_tokenizer(path, directory)
    return directory


def eos_token_ids(model: str | Path) -> list[int]:
    """The tokens that end an answer, in ascending order.

    Those of `generation_config.json`, or of `config.json` where it has none, and the tokenizer's own.
    Raises ModelError.
    """
    path = resolve_model_path(str(model))
    if path.is_file():
        file = GgufFile(path)
        found = (file.value(f"tokenizer.ggml.{key}") for key in _GGUF_END_TOKENS)
        return sorted({token for token in found if token is not None})
    config = _read_json(path / "config.json")
    named = (
        _as_list(_read_json(path / "generation_config.json").get("eos_token_id"))
        or _as_list(config.get("eos_token_id"))
        or _as_list(config.get("text_config", {}).get("eos_token_id"))
    )
    return sorted({*named, *_tokenizer_eos(path)})


def model_vocab_size(checkpoint: Path) -> int:
    """How many token ids the model has: its embedding's rows. An id from here on is none of its tokens, even
    where its tokenizer has one: fine-tuning often adds a token to the tokenizer alone.

    Imports no torch. Raises ModelError if the checkpoint does not say, or says two things.
    """
    path = resolve_model_path(str(checkpoint))
    if path.is_file():
        file = GgufFile(path)
        if "token_embd.weight" not in file.tensors:
            raise ModelError(f"{path}: it has no token_embd.weight, which embeds the tokens")
        return int(file.tensors["token_embd.weight"].shape[1])
    config = _read_json(path / "config.json")
    stated = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    embeddings = {
        name: shape[0]
        for name, shape in tensor_shapes(path).items()
        if len(shape) == 2 and f".{name}".endswith(tuple(f".{module}.weight" for module in _EMBEDDINGS))
    }
    differing = {name: rows for name, rows in embeddings.items() if rows != stated}
    if stated is None and len(set(embeddings.values())) == 1:
        return next(iter(embeddings.values()))
    if stated is None or differing:
        found = ", ".join(f"{name} has {rows} rows" for name, rows in differing.items())
        raise ModelError(
            f"{path}: config.json's vocab_size is {stated}, but {found or 'no tensor embeds tokens'}"
        )
    return int(stated)


def context_length(model: str | Path) -> int:
    """Tokens of the longest sequence that the model can be served with. Raises ModelError."""
    path = resolve_model_path(str(model))
    if path.is_file():
        file = GgufFile(path)
        length, rope = file.value(f"{file.architecture}.context_length"), rope_parameters(file)
    else:
        config = read_transformers_config(path).get_text_config()
        length = getattr(config, "max_position_embeddings", None)
        rope = getattr(config, "rope_parameters", None) or {}
    if length is None:
        raise ModelError(f"{path}: it does not say how long a sequence may be")
    return _rotary_length(length, rope)


def _rotary_length(length: int, rope: Mapping[str, Any]) -> int:
    """The length of a model whose config says `length`, with what its rotary embedding makes of it.

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


def read_transformers_config(directory: Path) -> PretrainedConfig:
    """The config of a Hugging Face directory. Raises ModelError."""
    from transformers import AutoConfig

    refuse_lfs_pointer(directory / "config.json")
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory}: no config that transformers can read: {error}") from error


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


def _convert_tokenizer(gguf: Path, directory: Path) -> None:
    """Fills `directory` with the tokenizer of a GGUF file; it appears whole or not at all."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=directory.parent, prefix="unfinished-"))
    try:
        command = [sys.executable, "-m", "fastserve.checkpoints.gguf_tokenizer", str(gguf), str(unfinished)]
        converted = subprocess.run(command, capture_output=True, text=True)
        if converted.returncode != 0:
            raise ModelError(f"{gguf}: its tokenizer cannot be converted: {converted.stderr.strip()[-2000:]}")
        unfinished.rename(directory)
    except OSError:
        # Another process was faster: a directory cannot be renamed onto one that is not empty.
        if not directory.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
