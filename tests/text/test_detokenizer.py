"""Incremental decoding says exactly what the full decode says."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fastserve.text.detokenizer import REPLACEMENT
from fastserve.text.tokenizer import Tokenizer

KINDS = [
    "byte_level",
    "byte_fallback",
    "byte_fallback_strip",
    "metaspace",
    "word_piece",
    "bpe_suffix",
    "no_decoder",
]


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """The byte tokens of a vocabulary with byte fallback."""
    vocabulary = tokenizer.backend.get_vocab()
    return [vocabulary[f"<0x{byte:02X}>"] for byte in data]


@pytest.mark.parametrize("kind", KINDS)
def test_pushes_and_flush_are_the_full_decode(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]

    @settings(max_examples=300, deadline=None)
    @given(
        pushes=st.lists(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=6), max_size=12),
        skip=st.booleans(),
    )
    def check(pushes: list[list[int]], skip: bool) -> None:
        detokenizer = tokenizer.new_detokenizer(skip_special_tokens=skip)
        text = "".join([detokenizer.push(ids) for ids in pushes]) + detokenizer.flush()
        assert text == tokenizer.decode([i for ids in pushes for i in ids], skip_special_tokens=skip)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_the_continuation_of_its_prompt(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    token_ids = st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=8)

    @settings(max_examples=1000, deadline=None)
    @given(prompt=token_ids, answer=token_ids, skip=st.booleans())
    def check(prompt: list[int], answer: list[int], skip: bool) -> None:
        detokenizer = tokenizer.new_detokenizer(prompt, skip_special_tokens=skip)
        text = "".join([detokenizer.push([token]) for token in answer]) + detokenizer.flush()
        before = tokenizer.decode(prompt, skip_special_tokens=skip)
        whole = tokenizer.decode(prompt + answer, skip_special_tokens=skip)
        is_whole_text = whole.startswith(before) and not before.endswith(REPLACEMENT)
        if is_whole_text and (before or not prompt):  # a space in bytes is no text until more comes
            assert before + text == whole

    check()


@pytest.mark.parametrize(
    ("kind", "prompt", "answer", "expected"),
    [
        ("byte_fallback_strip", ["a"], ["▁b", "▁a"], " b a"),
        ("byte_fallback_strip", ["a", *["</s>"] * 9], ["▁b"], " b"),
        ("byte_fallback_strip", [], ["▁b"], "b"),
        ("byte_fallback_strip", ["<s>"], ["▁b"], "b"),
        ("byte_fallback", ["a"], ["▁b"], " b"),
        ("metaspace", ["a"], ["▁b", "▁▁c"], " b  c"),
        ("metaspace", [], ["▁b"], "b"),
        ("word_piece", ["do"], ["##d", "not", "."], "d not."),
        ("bpe_suffix", ["e</w>"], ["f</w>"], " f"),
        ("no_decoder", ["do"], ["not"], " not"),
    ],
)
def test_the_space_before_the_first_word(
    kind: str, prompt: list[str], answer: list[str], expected: str, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[kind]
    vocabulary = tokenizer.backend.get_vocab()
    detokenizer = tokenizer.new_detokenizer([vocabulary[token] for token in prompt])
    assert detokenizer.push(vocabulary[token] for token in answer) + detokenizer.flush() == expected


SMILE = "\N{SLIGHTLY SMILING FACE}"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "byte_fallback_strip"])
@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize(
    ("rest", "expected"), [(None, f"{SMILE}a"), (b"", "a")], ids=["completed", "not completed"]
)
def test_a_prompt_that_ends_within_a_character(
    kind: str, cut: int, rest: bytes | None, expected: str, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[kind]
    data = SMILE.encode()
    prompt = one_by_one(tokenizer, kind, SMILE.encode() + data[:cut])
    answer = one_by_one(tokenizer, kind, data[cut:] if rest is None else rest)
    detokenizer = tokenizer.new_detokenizer(prompt)
    text = detokenizer.push([*answer, tokenizer.encode("a", special_tokens=False)[0]])
    assert text + detokenizer.flush() == expected


def one_by_one(tokenizer: Tokenizer, kind: str, data: bytes) -> list[int]:
    """A token for each byte."""
    if kind != "byte_level":
        return byte_tokens(tokenizer, data)
    vocabulary = tokenizer.backend.get_vocab()
    characters = bytes_to_unicode()
    return [vocabulary[characters[byte]] for byte in data]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "byte_fallback_strip"])
def test_any_text_comes_back_without_a_broken_character(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    # A vocabulary with byte fallback writes a space as U+2581, and cannot tell the two apart.
    excluded = REPLACEMENT + " " + ("" if kind == "byte_level" else "\u2581")

    @settings(max_examples=200, deadline=None)
    @given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters=excluded)))
    def check(text: str) -> None:
        detokenizer = tokenizer.new_detokenizer()
        pieces = [detokenizer.push([token]) for token in tokenizer.encode(text, special_tokens=False)]
        assert not any(REPLACEMENT in piece for piece in pieces)
        assert "".join(pieces) + detokenizer.flush() == text

    check()


def test_replacement_character_in_the_text_itself_comes_through(tokenizer: Tokenizer) -> None:
    detokenizer = tokenizer.new_detokenizer()
    assert detokenizer.push(tokenizer.encode(f"a{REPLACEMENT}")) == f"a{REPLACEMENT}"
    assert detokenizer.flush() == ""


def test_byte_level_holds_back_only_an_unfinished_character(tokenizer: Tokenizer) -> None:
    euro = tokenizer.encode("€", special_tokens=False)
    detokenizer = tokenizer.new_detokenizer()
    assert [detokenizer.push([token]) for token in euro] == ["", "", "€"]
    assert detokenizer.push([euro[0], euro[0], euro[0]]) == REPLACEMENT * 2
    assert detokenizer.flush() == REPLACEMENT


def test_byte_fallback_does_not_hold_back_invalid_bytes(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_fallback"]
    detokenizer = tokenizer.new_detokenizer()
    assert [detokenizer.push(byte_tokens(tokenizer, b"\x80")) for _ in range(3)] == [REPLACEMENT] * 3


def test_byte_fallback_shows_a_run_when_it_ends(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_fallback"]
    detokenizer = tokenizer.new_detokenizer()
    assert detokenizer.push(byte_tokens(tokenizer, "€".encode())) == ""
    assert detokenizer.push(tokenizer.encode("a")) == "€a"


def test_special_token_inside_a_character_is_skipped(tokenizer: Tokenizer) -> None:
    first, *rest = tokenizer.encode("€", special_tokens=False)
    detokenizer = tokenizer.new_detokenizer()
    assert detokenizer.push([first, *tokenizer.eos_token_ids, *rest]) == "€"


def test_the_default_models_vocabulary(tokenizer_directory: Path) -> None:
    tokenizer = Tokenizer(tokenizer_directory)

    @settings(max_examples=100, deadline=None)
    @given(ids=st.lists(st.integers(0, tokenizer.vocab_size), max_size=40), skip=st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        detokenizer = tokenizer.new_detokenizer(skip_special_tokens=skip)
        text = "".join([detokenizer.push([token]) for token in ids]) + detokenizer.flush()
        assert text == tokenizer.decode(ids, skip_special_tokens=skip)

    check()
