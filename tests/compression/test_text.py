"""From text to windows of token ids."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fastserve.corpus.sources import Calibration, Evaluation
from fastserve.corpus.windows import (
    TextError,
    calibration_text,
    calibration_windows,
    evaluation_text,
    evaluation_windows,
    read_text,
    token_windows,
)

MakeTokenizer = Callable[..., Path]
BEGIN = "<s>"


@pytest.fixture(scope="session")
def tokenizer(save_byte_tokenizer: MakeTokenizer) -> Path:
    return save_byte_tokenizer()


def ids_of(directory: Path, text: str) -> list[int]:
    return Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def test_the_packaged_texts_have_the_size_that_their_readme_tells() -> None:
    assert 600_000 < len(calibration_text().encode()) < 650_000
    assert 190_000 < len(evaluation_text().encode()) < 210_000


def test_no_paragraph_is_both_in_the_calibration_and_in_the_evaluation_text() -> None:
    both = set(calibration_text().split("\n\n")) & set(evaluation_text().split("\n\n"))
    assert [paragraph for paragraph in both if len(paragraph) > 80] == []


def test_the_readme_of_the_texts_names_every_file_and_every_licence_file() -> None:
    corpus = resources.files("fastserve.corpus") / "texts"
    readme = (corpus / "README.md").read_text(encoding="utf-8")
    for folder in ("calibration", "evaluation", "licenses"):
        for file in (corpus / folder).iterdir():
            assert f"`{folder}/{file.name}`" in readme


def test_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("öne", encoding="utf-8")
    (tmp_path / "b.txt").write_text("two", encoding="utf-8")
    assert read_text([tmp_path / "b.txt", str(tmp_path / "a.txt")]) == "two\n\nöne"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "cannot be read"), (b"caf\xe9 au lait", r"not UTF-8 \(byte 3"), (b" \n", "holds no text")],
)
def test_a_file_that_is_no_text_is_refused_by_name(
    tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    if content is not None:
        (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(TextError, match=rf"notes\.txt: {complaint}"):
        read_text([tmp_path / "notes.txt"])


def test_all_windows_together_are_the_text_but_for_its_last_tokens(tokenizer: Path) -> None:
    text = "abcdefghijklmnopqrstuvwxyz"
    windows = token_windows(tokenizer, text, 4)
    assert windows.shape == (6, 4)
    assert windows.dtype == torch.int64
    assert windows.flatten().tolist() == ids_of(tokenizer, text[:24])


def test_every_window_begins_with_what_the_tokenizer_puts_before_a_text(
    save_byte_tokenizer: MakeTokenizer,
) -> None:
    directory = save_byte_tokenizer(begin=True)
    begin = Tokenizer.from_file(str(directory / "tokenizer.json")).token_to_id(BEGIN)
    windows = token_windows(directory, "abcdefgh", 5)
    assert windows.tolist() == [[begin, *ids_of(directory, "abcd")], [begin, *ids_of(directory, "efgh")]]


@given(st.integers(1, 40), st.integers(1, 40), st.none() | st.integers(0, 5))
def test_samples_are_one_of_each_of_as_many_equal_stretches(
    tokenizer: Path, count: int, samples: int, seed: int | None
) -> None:
    text = "".join(chr(33 + index) for index in range(count))
    if samples > count:
        with pytest.raises(TextError, match=f"{count} windows of 1 tokens; needed: {samples}"):
            token_windows(tokenizer, text, 1, samples, seed)
        return
    order = ids_of(tokenizer, text)
    windows = token_windows(tokenizer, text, 1, samples, seed)
    places = [order.index(token) for token in windows.flatten().tolist()]
    bounds = [count * index // samples for index in range(samples + 1)]
    assert len(places) == samples
    assert all(first <= place < end for place, (first, end) in zip(places, pairwise(bounds), strict=True))


def test_the_same_seed_draws_the_same_windows_and_another_others(tokenizer: Path) -> None:
    text = evaluation_text()[:20_000]
    first, again, other = (token_windows(tokenizer, text, 64, 20, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_text_shorter_than_a_window_is_refused(tokenizer: Path) -> None:
    with pytest.raises(TextError, match="3 tokens; needed: at least one window of 4"):
        token_windows(tokenizer, "abc", 4)


def test_what_is_held_out_is_neither_measured_nor_trained_on(tokenizer: Path) -> None:
    windows = calibration_windows(Calibration(samples=200, length=256), tokenizer, seed=3)
    assert windows.measured.shape == (200, 256)
    assert windows.held_out.shape == (16, 256)
    measured, training, held_out = (
        {tuple(row) for row in part.tolist()}
        for part in (windows.measured, windows.training, windows.held_out)
    )
    assert measured < training
    assert not training & held_out


def test_training_windows_are_all_of_the_text_but_what_is_held_out_and_those_between(
    tokenizer: Path, tmp_path: Path
) -> None:
    """Of 25 windows of 4, the tenth and the twentieth are held out."""
    (tmp_path / "mine.txt").write_text("".join(chr(ord("!") + place % 90) for place in range(100)))
    source = Calibration(files=(str(tmp_path / "mine.txt"),), samples=3, length=4)
    ids = torch.tensor(ids_of(tokenizer, (tmp_path / "mine.txt").read_text()))
    windows = calibration_windows(source, tokenizer, seed=0)
    held_out = {9, 19}
    whole = [ids[4 * i : 4 * i + 4] for i in range(25) if i not in held_out]
    between = [ids[4 * i + 2 : 4 * i + 6] for i in range(24) if not {i, i + 1} & held_out]
    assert torch.equal(windows.training, torch.stack(whole + between))


def test_files_of_the_user_replace_the_packaged_text(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x" * 2000)
    files = (str(tmp_path / "mine.txt"),)
    (mine,) = set(ids_of(tokenizer, "x"))
    windows = calibration_windows(Calibration(files=files, samples=10, length=16), tokenizer, seed=0)
    evaluation = evaluation_windows(Evaluation(files=files, length=16), tokenizer)
    assert {*windows.training.unique().tolist(), *windows.held_out.unique().tolist()} == {mine}
    assert evaluation.unique().tolist() == [mine]
    assert len(evaluation) == 125


def test_calibration_text_too_short_to_hold_any_out_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x" * 100)
    source = Calibration(files=(str(tmp_path / "mine.txt"),), samples=2, length=16)
    with pytest.raises(TextError, match="6 windows of 16 tokens; needed: at least 10"):
        calibration_windows(source, tokenizer, seed=0)


def test_evaluation_is_of_about_as_many_tokens_as_are_asked_for(tokenizer: Path) -> None:
    whole = evaluation_windows(Evaluation(length=512), tokenizer)
    assert len(whole) == len(evaluation_text().encode()) // 512
    assert evaluation_windows(Evaluation(length=512, tokens=5000), tokenizer).shape == (9, 512)
    assert len(evaluation_windows(Evaluation(length=512, tokens=10**9), tokenizer)) == len(whole)
