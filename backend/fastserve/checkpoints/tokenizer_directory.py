"""The directory with a model's tokenizer; that of a GGUF file is converted once and kept in the user's cache.

Imports no torch: the conversion (`gguf_tokenizer`) does, and runs in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from fastserve.atomic_write import WriteError, atomic_directory
from fastserve.cache_directory import cache_path
from fastserve.checkpoints.gguf_file import GgufFile
from fastserve.checkpoints.lfs_pointer import refuse_lfs_pointer
from fastserve.checkpoints.model_error import ModelError

_CONVERSION = 2
"""The version of what `gguf_tokenizer` makes of a file: raised with every change, so that no older tokenizer
in the cache is used."""
_LONGEST_MESSAGE = 2000
"""Characters of the conversion's error output that are shown, from its end."""


def resolve_tokenizer_directory(checkpoint: Path) -> Path:
    """The directory with `tokenizer.json`, `tokenizer_config.json` and the chat template of a checkpoint.

    A Hugging Face directory has them itself. The tokenizer of a GGUF file is converted, in seconds, and found
    again by a digest of all that it is made of. Raises ModelError if it cannot be converted or written.
    """
    if checkpoint.is_dir():
        refuse_lfs_pointer(checkpoint / "tokenizer.json")
        return checkpoint
    made_by = f"{_CONVERSION}-transformers-{version('transformers')}"
    directory = cache_path(f"tokenizers/{GgufFile(checkpoint).header_digest()[:32]}-{made_by}")
    if not directory.is_dir():
        _convert(checkpoint, directory)
    return directory


def _convert(gguf: Path, directory: Path) -> None:
    """Makes `directory` with the tokenizer of a GGUF file, whole or not at all."""
    try:
        with atomic_directory(directory) as unfinished:
            command = [sys.executable, "-m", "fastserve.checkpoints.gguf_tokenizer"]
            converted = subprocess.run([*command, str(gguf), str(unfinished)], capture_output=True, text=True)
            if converted.returncode != 0:
                message = converted.stderr.strip()[-_LONGEST_MESSAGE:]
                raise ModelError(f"{gguf}: its tokenizer cannot be converted: {message}")
    except WriteError as error:
        # Another process may have been faster: a directory does not take the place of one with files in it.
        if not directory.is_dir():
            raise ModelError(f"{gguf}: its tokenizer cannot be kept: {error}") from error
