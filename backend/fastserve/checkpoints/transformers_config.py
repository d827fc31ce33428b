"""The config of a Hugging Face directory, as transformers reads it.

Imports transformers only when it is asked to read: processes that never do so stay light.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastserve.checkpoints.lfs_pointer import refuse_lfs_pointer
from fastserve.checkpoints.model_error import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def read_transformers_config(directory: Path) -> PretrainedConfig:
    """`config.json` of a directory. Raises ModelError if transformers cannot read it."""
    from transformers import AutoConfig

    refuse_lfs_pointer(directory / "config.json")
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory}: no config that transformers can read: {error}") from error
