"""What the settings of access name is tried before a server starts: its models would fail one by one."""

from __future__ import annotations

import os
from pathlib import Path

from fastserve.access.keys_file import KeysFileError, read_keys
from fastserve.access.masking import check_masking
from fastserve.access.request_log import MODE
from fastserve.config import Config
from fastserve.start_error import StartError


def check_access(config: Config) -> None:
    """Raises StartError for a keys file or a request log that cannot be used; the sentence names the flag."""
    if config.keys_file:
        try:
            read_keys(Path(config.keys_file))
        except KeysFileError as error:
            raise StartError(f"--keys-file: {error}; `fastserve keys add` makes one") from error
    if config.request_log:
        try:
            os.close(os.open(config.request_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, MODE))
        except OSError as error:
            raise StartError(f"--request-log {config.request_log}: {error.strerror}") from error
    if config.log_prompts == "masked":
        try:
            check_masking()
        except ImportError as error:
            raise StartError(
                f"--log-prompts masked: {error}; install it with: pip install 'fastserve[masking]'"
            ) from error
