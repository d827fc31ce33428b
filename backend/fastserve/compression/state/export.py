"""The result of a compression: an ordinary Hugging Face directory.

Weights are written as compressed-tensors has them if it can express them all, so that transformers and vLLM
load the result too; else in our own layout. docs/formats.md describes both.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig

from fastserve.atomic_write import atomic_directory, write_bytes, write_errors
from fastserve.checkpoints.kv_cache_scheme import SCHEME
from fastserve.checkpoints.safetensors_files import INDEX, SINGLE
from fastserve.compression.state.encoders import CompressedTensorsEncoder, Encoder, OwnEncoder, expressible
from fastserve.compression.state.model_state import State, save_tensors
from fastserve_kernels.formats import Weight

SHARD_BYTES = 4 << 30
"""A larger model is written as several files."""
GENERATION_CONFIG = "generation_config.json"
_TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
)


def export(state: State, tokenizer_directory: Path, out: Path) -> None:
    """Writes the directory `out`, which must not exist; it appears whole.

    `tokenizer_directory` has the files of the tokenizer, and perhaps a generation config.
    Raises WriteError.
    """
    suits = all(expressible(name, part) for name, part in _parts(state) if isinstance(part, Weight))
    encoder: Encoder = CompressedTensorsEncoder() if suits else OwnEncoder()
    with atomic_directory(out) as directory:
        shards = _Shards(directory)
        for name, part in _parts(state):
            if isinstance(part, Weight):
                shards.add({f"{name}.{local}": t for local, t in encoder.encode(name, part).items()})
            else:
                shards.add({name: part})
        shards.finish()
        with write_errors(out):
            _write_configs(state, encoder, directory)
            _copy_tokenizer(tokenizer_directory, directory)


def _parts(state: State) -> Iterator[tuple[str, Tensor | Weight]]:
    """The model by full names, one layer in memory at a time."""
    yield from state.outer().items()
    for index in range(state.num_layers):
        for name, part in state.layer(index).items():
            yield f"{state.meta_model.prefix}{index}.{name}", part


def _write_configs(state: State, encoder: Encoder, directory: Path) -> None:
    config = copy.deepcopy(state.config)
    config.dtype = state.dtype
    # The only thing that a state's config says of quantization is how the cache is kept.
    kv_cache = (getattr(config, "quantization_config", None) or {}).get(SCHEME)
    for key, value in encoder.config(kv_cache).items():
        setattr(config, key, value)
    config.save_pretrained(directory)
    GenerationConfig.from_model_config(state.config).save_pretrained(directory)


def _copy_tokenizer(source: Path, directory: Path) -> None:
    """Copies the tokenizer's files, and the source's generation config, if any, in place of the config's."""
    for pattern in (*_TOKENIZER_FILES, GENERATION_CONFIG):
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)


class _Shards:
    """Writes tensors to as many safetensors files as they need."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pending: dict[str, Tensor] = {}
        self._names: list[list[str]] = []
        self._sizes: list[int] = []

    def add(self, tensors: dict[str, Tensor]) -> None:
        if self._pending and _size(self._pending) + _size(tensors) > SHARD_BYTES:
            self._write()
        self._pending |= {name: tensor.contiguous() for name, tensor in tensors.items()}

    def finish(self) -> None:
        """Gives the files their names, which say how many there are, and writes the index."""
        self._write()
        count = len(self._names)
        if count == 1:
            self._shard(0).rename(self._directory / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._names):
            name = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._shard(index).rename(self._directory / name)
            weight_map |= dict.fromkeys(names, name)
        content = {"metadata": {"total_size": sum(self._sizes)}, "weight_map": weight_map}
        write_bytes(self._directory / INDEX, json.dumps(content, indent=2, sort_keys=True).encode())

    def _write(self) -> None:
        save_tensors(self._pending, self._shard(len(self._names)), {"format": "pt"})
        self._names.append(sorted(self._pending))
        self._sizes.append(_size(self._pending))
        self._pending = {}

    def _shard(self, index: int) -> Path:
        return self._directory / f"shard-{index}"


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
