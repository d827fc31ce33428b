"""A GGUF file's metadata and tensor table (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

Imports no torch: processes that never load it find the tokenizer's directory with the help of this module.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, ReaderTensor

from fastserve.checkpoints.lfs_pointer import refuse_lfs_pointer
from fastserve.checkpoints.model_error import ModelError


class GgufFile:
    """The header of a GGUF file, and its tensors as memory-mapped arrays."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError if the file is no GGUF file or is cut off."""
        refuse_lfs_pointer(path)
        try:
            # Copy on write: torch wants to see writable arrays, though nobody writes.
            self._reader = _HeaderReader(path, mode="c")
        except (ValueError, IndexError, struct.error) as error:
            raise ModelError(f"{path}: not a readable GGUF file: {error}") from error
        self.path = path
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in self._reader.tensors}

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, the prefix of its metadata keys."""
        return self.value("general.architecture")

    @property
    def vocab_size(self) -> int:
        """The rows of the embedding. Raises KeyError if the file has none."""
        return int(self.tensors["token_embd.weight"].shape[1])

    @property
    def head_dim(self) -> int:
        """Elements of each head's query. Raises ModelError if the file does not say."""
        return self.architecture_value("attention.key_length") or (
            self.required_value("embedding_length") // self.required_value("attention.head_count")
        )

    def value(self, key: str, default: Any = None) -> Any:
        """The metadata value of a whole key, such as `tokenizer.ggml.pre`; `default` if it is not there, or
        if it is an array of strings."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def architecture_value(self, key: str, default: Any = None) -> Any:
        """The metadata value of a key of the architecture, such as `rope.freq_base`; `default` if it is not
        there."""
        return self.value(f"{self.architecture}.{key}", default)

    def required_value(self, key: str) -> Any:
        """The metadata value of a key of the architecture. Raises ModelError if it is not there."""
        found = self.architecture_value(key)
        if found is None:
            raise ModelError(f"{self.path}: the metadata has no {self.architecture}.{key}")
        return found

    def release_pages(self) -> None:
        """Lets go of what was read of the file: its pages count as this process's memory else, though the
        system could have them back."""
        mapped: Any = self._reader.data.base
        mapped.madvise(mmap.MADV_DONTNEED)

    def header_digest(self) -> str:
        """SHA-256 of everything before the tensors' data: what a tokenizer is made of, and its version."""
        return hashlib.sha256(self._reader.data[: self._reader.data_offset].tobytes()).hexdigest()


def tensor_shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """The shape of a tensor as torch has it, rows first: GGUF lists the innermost dimension first."""
    return tuple(int(size) for size in reversed(tensor.shape))


class _HeaderReader(GGUFReader):
    """A reader that keeps an array of numbers as one piece and steps over arrays of strings.

    Those are the vocabulary and the merges, of which the base class makes a numpy array per token: more than
    a second for a small model, and nobody here reads them.
    """

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[np.ndarray], list[int], list[GGUFValueType]]:
        if GGUFValueType(raw_type) != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item_type = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        length = int(self._get(orig_offs + 4, np.uint64)[0])
        types, start = [GGUFValueType.ARRAY, item_type], orig_offs + 12
        if item_type == GGUFValueType.STRING:
            return self._end_of_strings(start, length) - orig_offs, [], [], types
        if item_type not in self.gguf_scalar_to_np:
            return super()._get_field_parts(orig_offs, raw_type)
        numbers = self._get(start, self.gguf_scalar_to_np[item_type], length)
        return start - orig_offs + numbers.nbytes, [numbers], [0], types

    def _end_of_strings(self, offset: int, count: int) -> int:
        """The offset behind `count` strings that begin at `offset`: each is its length and its bytes."""
        length_of = struct.Struct("<Q" if self.byte_order == "I" else ">Q")
        buffer = self.data.data
        for _ in range(count):
            offset += 8 + length_of.unpack_from(buffer, offset)[0]
        return offset
