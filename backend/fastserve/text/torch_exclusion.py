"""Keeps torch out of a process that only handles text: transformers imports it wherever it is installed."""

from __future__ import annotations

import logging
import sys


def keep_torch_out() -> None:
    """Makes `import torch` fail in this process from now on, so that transformers does not load it.

    Loading torch takes a second and some hundred megabytes. To be called before transformers is imported;
    there is no way back. Where torch is loaded already nothing is gained, and nothing is done.
    """
    if "torch" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    logging.getLogger("transformers").addFilter(_is_not_torch_notice)


def _is_not_torch_notice(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()
