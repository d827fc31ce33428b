"""`python -m fastserve.models.gguf_tokenizer GGUF DIRECTORY`: its tokenizer as transformers saves it.

A program of its own, because the conversion imports torch and the processes that want the tokenizer do not.
"""

from __future__ import annotations

import sys
from pathlib import Path


def convert(gguf: Path, directory: Path) -> None:
    """Raises ValueError for a tokenizer that transformers cannot convert."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except ValueError as error:
        sys.exit(str(error))
