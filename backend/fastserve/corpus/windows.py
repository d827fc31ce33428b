"""Windows of token ids from calibration and evaluation text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from fastserve.corpus.sources import Calibration, Evaluation
from fastserve.text.tokenizer import Tokenizer

BETWEEN_DOCUMENTS = "\n\n"
HELD_OUT_EVERY = 10
"""One window of so many of the calibration text is held out."""
HELD_OUT_TOKENS = 4096
"""Held-out tokens that are evaluated, about."""


class TextError(ValueError):
    """Text that cannot be used; the sentence says which, why, and what would do."""


def calibration_text() -> str:
    """The calibration text that comes with FastServe, about 620 kB. See `corpus/texts/README.md`."""
    return _packaged("calibration")


def evaluation_text() -> str:
    """The evaluation text that comes with FastServe, about 200 kB: other documents than those of
    calibration."""
    return _packaged("evaluation")


def read_text(files: Sequence[str | Path]) -> str:
    """The files' text, one after the other. Raises TextError for one that is missing, empty or not UTF-8."""
    return BETWEEN_DOCUMENTS.join(_read(Path(file).expanduser()) for file in files)


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"text file {path}: not UTF-8 (byte {error.start}: {error.reason}); allowed: plain text in UTF-8"
        ) from error
    except OSError as error:
        raise TextError(f"text file {path}: cannot be read: {error.strerror}") from error
    if not text.strip():
        raise TextError(f"text file {path}: holds no text")
    return text


def _packaged(part: str) -> str:
    folder = resources.files("fastserve.corpus") / "texts" / part
    documents = sorted((file for file in folder.iterdir()), key=lambda file: file.name)
    return BETWEEN_DOCUMENTS.join(file.read_text(encoding="utf-8") for file in documents)


def token_windows(
    tokenizer: Tokenizer | Path, text: str, length: int, samples: int | None = None, seed: int | None = None
) -> Tensor:
    """Windows of `length` tokens that do not overlap, in the text's order, [samples, length] int64.

    `samples` None: all of them; else so many, spread evenly over the text: the middle one of each of as many
    equal stretches, or with a `seed` one drawn from each. A window begins with the tokens that the tokenizer
    puts before every text (Llama 3: one), as the windows of a model in service do. `tokenizer` may be the
    directory of one.

    Raises TextError if the text has fewer windows than `samples`, or none.
    """
    windows = _cut(*_encode(tokenizer, text), length)
    return windows if samples is None else _spread(windows, samples, seed)


@dataclass(frozen=True)
class CalibrationWindows:
    """Windows of the calibration text, each tensor [samples, length] int64."""

    measured: Tensor
    """As many windows as are asked for, to measure on."""
    training: Tensor
    """All windows that are not held out, and those half a window further on: tokens come in two contexts."""
    held_out: Tensor
    """Some of every tenth window, so that these too come from all over the text."""


def calibration_windows(source: Calibration, tokenizer: Path, seed: int) -> CalibrationWindows:
    """The windows of a calibration source, of `source.samples` and `source.length`. Raises TextError."""
    text = read_text(source.files) if source.files else calibration_text()
    start, ids = _encode(tokenizer, text)
    windows = _cut(start, ids, source.length)
    is_held_out = torch.arange(len(windows)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    held_out = windows[is_held_out]
    if not len(held_out):
        raise TextError(
            f"calibration text: {len(windows)} windows of {source.length} tokens; needed: at least "
            f"{HELD_OUT_EVERY}. Give longer files, or a smaller length"
        )
    further_on = _cut(start, ids[(source.length - len(start)) // 2 :], source.length)[: len(windows) - 1]
    touches = (is_held_out[:-1] | is_held_out[1:])[: len(further_on)]
    looked_at = min(len(held_out), max(1, HELD_OUT_TOKENS // source.length))
    return CalibrationWindows(
        _spread(windows[~is_held_out], source.samples, seed),
        torch.cat((windows[~is_held_out], further_on[~touches])),
        _spread(held_out, looked_at, None),
    )


def evaluation_windows(source: Evaluation, tokenizer: Path) -> Tensor:
    """The evaluation windows [samples, source.length], of about `source.tokens` tokens. Raises TextError."""
    text = read_text(source.files) if source.files else evaluation_text()
    windows = _cut(*_encode(tokenizer, text), source.length)
    if not source.tokens:
        return windows
    return _spread(windows, min(len(windows), max(1, source.tokens // source.length)), None)


def _encode(tokenizer: Tokenizer | Path, text: str) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before every text, and those of the text."""
    if isinstance(tokenizer, Path):
        tokenizer = Tokenizer(tokenizer)
    return tokenizer.backend.encode("").ids, tokenizer.backend.encode(text, add_special_tokens=False).ids


def _cut(start: list[int], ids: list[int], length: int) -> Tensor:
    """Windows [samples, length] of adjacent tokens, each after the start."""
    step = length - len(start)
    count = len(ids) // step
    if not count:
        raise TextError(
            f"text: {len(ids)} tokens; needed: at least one window of {length}. Give longer files"
        )
    windows = torch.tensor(ids[: count * step], dtype=torch.int64).view(count, step)
    return torch.cat([torch.tensor([start], dtype=torch.int64).expand(count, -1), windows], dim=1)


def _spread(windows: Tensor, samples: int, seed: int | None) -> Tensor:
    """One window of each of `samples` equal stretches."""
    count = len(windows)
    if samples > count:
        raise TextError(
            f"text: {count} windows of {windows.shape[1]} tokens; needed: {samples}. Give longer files, "
            "fewer samples or a smaller length"
        )
    bounds = [count * index // samples for index in range(samples + 1)]
    stretches = [range(first, last) for first, last in pairwise(bounds)]
    if seed is None:
        return windows[[stretch[len(stretch) // 2] for stretch in stretches]]
    numbers = random.Random(seed)
    return windows[[numbers.choice(stretch) for stretch in stretches]]
