"""`fastserve embed --model PATH FILE`: the embeddings of a file's lines, as a NumPy file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from rich.console import Console
from rich.progress import Progress

from fastserve.atomic_write import WriteError, atomic_write
from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.online_quantization import QUANTIZATIONS
from fastserve.config import ConfigError
from fastserve.encoders.encoder import Encoder
from fastserve.errors import RequestError
from fastserve.models.model_loader import DTYPES

ERRORS = (ModelError, RequestError, WriteError)
CHUNK = 256
"""Texts that are embedded together; the bar moves on by so many."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `fastserve embed`."""
    parser.add_argument("file", metavar="FILE", help="UTF-8, a text a line; `-`: standard input")
    parser.add_argument("--model", required=True, help="directory (safetensors) or hub name of an embedder")
    parser.add_argument(
        "--out", metavar="FILE", help="float32 [lines, dimensions] (default: FILE with the ending .npy)"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto: the checkpoint's own (default: %(default)s)",
    )
    parser.add_argument(
        "--quantization", choices=QUANTIZATIONS, default="auto", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--prompt-name", metavar="NAME", help="one of the model's prompts, such as `query`")
    parser.add_argument(
        "--dimensions", type=int, metavar="N", help="only the first (default: all that the model has)"
    )
    parser.add_argument(
        "--truncate", action="store_true", help="cut texts that are too long; without it they are refused"
    )


def run(arguments: argparse.Namespace) -> int:
    """Embeds and writes. Raises ConfigError for a wrong flag, and those in ERRORS."""
    out = _out(arguments)
    texts = _read(arguments.file)
    encoder = Encoder.load(
        arguments.model, dtype=arguments.dtype, quantization=arguments.quantization, device=arguments.device
    )
    dimensions = encoder.dimensions if arguments.dimensions is None else arguments.dimensions
    encoder.check_dimensions(dimensions)
    size = 4 * len(texts) * dimensions
    with atomic_write(out, size) as unfinished, Progress(console=Console(stderr=True)) as progress:
        rows = open_memmap(unfinished, mode="w+", dtype=np.float32, shape=(len(texts), dimensions))
        bar = progress.add_task(f"{len(texts)} texts", total=len(texts))
        first = 0
        for chunk in _chunks(texts):
            rows[first : first + len(chunk)] = _embed(encoder, chunk, first, arguments)
            first += len(chunk)
            progress.update(bar, completed=first)
        rows.flush()
    print(f"{out}: {len(texts)} embeddings of {dimensions} dimensions")
    return 0


def _embed(encoder: Encoder, chunk: Sequence[str], first: int, arguments: argparse.Namespace) -> np.ndarray:
    try:
        return encoder.embed(
            chunk,
            prompt_name=arguments.prompt_name,
            dimensions=arguments.dimensions,
            truncate=arguments.truncate,
        )
    except RequestError as error:
        raise RequestError(f"lines {first + 1} to {first + len(chunk)}: {error}") from error


def _out(arguments: argparse.Namespace) -> Path:
    if arguments.out:
        return Path(arguments.out)
    if arguments.file == "-":
        raise ConfigError("--out: got none; allowed with standard input: a file")
    return Path(arguments.file).with_suffix(".npy")


def _read(file: str) -> list[str]:
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        texts = content.decode().removesuffix("\n").split("\n") if content else []
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: got {error.reason} at byte {error.start}; allowed: UTF-8") from error
    if not texts:
        raise ConfigError(f"{file}: got no line; allowed: a text a line")
    return texts


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for first in range(0, len(texts), CHUNK):
        yield texts[first : first + CHUNK]
