"""Tokenizers of GGUF files: how text is cut, and the space before it, as llama.cpp has them.

transformers 5.23 takes many pre-tokenizers for GPT-2's without a word, and reads no `add_space_prefix`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fastserve.checkpoints.gguf_tokenizer import convert
from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.tokenizer_directory import resolve_tokenizer_directory

BYTES = list(bytes_to_unicode().values())
SPACES, LETTERS, DIGITS, WORD = 256, 257, 258, 259
PIECES = ["<unk>", "<s>", "</s>", "▁", "▁▁", "a", "▁a", "b"]


@pytest.fixture
def byte_level(write_tokenizer_gguf: Callable[..., Path]) -> Callable[..., Path]:
    """Bytes; two spaces, two letters and two digits that are merged; and a word that no merge makes."""

    def make(**keys: Any) -> Path:
        tokens = [*BYTES, "ĠĠ", "ab", "12", "xyz", "<bos>"]
        merges = ["Ġ Ġ", "a b", "1 2"]
        types = [1] * (len(tokens) - 1) + [3]
        return write_tokenizer_gguf("gpt2", tokens, merges=merges, token_type=types, bos_token_id=260, **keys)

    return make


def load(path: Path) -> PreTrainedTokenizerBase:
    """The converted tokenizer, in this process: another would be a program's start for each."""
    directory = path.parent / "tokenizer"
    convert(path, directory)
    return AutoTokenizer.from_pretrained(directory)


def ids(path: Path, text: str) -> list[int]:
    return load(path)(text).input_ids


def byte(character: str) -> int:
    return BYTES.index(bytes_to_unicode()[ord(character)])


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        # GPT-2 leaves the last of several spaces to the word or number behind it.
        ("gpt-2", "ab  12", [LETTERS, byte(" "), byte(" "), DIGITS]),
        ("olmo", "ab  12", [LETTERS, byte(" "), byte(" "), DIGITS]),
        # Where each digit is cut out first, the spaces before it stay together.
        ("smollm", "ab  12", [LETTERS, SPACES, byte("1"), byte("2")]),
        ("starcoder", "ab  12", [LETTERS, SPACES, byte("1"), byte("2")]),
        ("refact", "12ab", [byte("1"), byte("2"), LETTERS]),
        # Qwen2 cuts digits too, and takes no space for them.
        ("qwen2", "ab  12", [LETTERS, byte(" "), byte(" "), byte("1"), byte("2")]),
        ("stablelm2", "ab  12", [LETTERS, byte(" "), byte(" "), byte("1"), byte("2")]),
        # Llama 3 has up to three digits in a piece, GPT-2 any number.
        ("smaug-bpe", "1212", [DIGITS, byte("1"), byte("2")]),
        ("gpt-2", "1212", [DIGITS, DIGITS]),
    ],
)
def test_text_is_cut_as_the_file_names_it(
    pre: str, text: str, expected: list[int], byte_level: Callable[..., Path]
) -> None:
    assert ids(byte_level(pre=pre), text) == expected


def test_words_of_the_vocabulary_go_before_merges_where_the_pre_tokenizer_says_so(
    byte_level: Callable[..., Path],
) -> None:
    assert ids(byte_level(pre="llama-bpe", add_bos_token=False), "xyz") == [WORD]
    assert ids(byte_level(pre="qwen2"), "xyz") == [byte("x"), byte("y"), byte("z")]


def test_llama_3_begins_with_its_token_unless_the_file_says_otherwise(
    byte_level: Callable[..., Path],
) -> None:
    assert ids(byte_level(pre="llama-bpe"), "ab") == [260, LETTERS]
    assert ids(byte_level(pre="llama-bpe", add_bos_token=True), "ab") == [260, LETTERS]
    assert ids(byte_level(pre="llama-bpe", add_bos_token=False), "ab") == [LETTERS]
    assert ids(byte_level(pre="qwen2"), "ab") == [LETTERS]


@pytest.mark.parametrize("keys", [{"pre": "deepseek-llm"}, {"pre": "default"}, {}])
def test_a_pre_tokenizer_that_nobody_can_vouch_for_is_named(
    keys: dict[str, str], byte_level: Callable[..., Path]
) -> None:
    name = repr(keys.get("pre"))
    with pytest.raises(ValueError, match=rf"tokenizer\.ggml\.pre: got {name}; allowed: .*gpt-2, .*smollm"):
        load(byte_level(**keys))


def test_the_error_of_the_conversion_reaches_the_operator(
    byte_level: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"model\.gguf: .*tokenizer\.ggml\.pre: got 'viking'; allowed: "):
        resolve_tokenizer_directory(byte_level(pre="viking"))


@pytest.mark.parametrize(
    ("keys", "text", "expected", "decoded"),
    [
        ({}, "ab", ["<s>", "▁a", "b"], "ab"),
        ({"add_space_prefix": True}, " a", ["<s>", "▁", "▁a"], " a"),
        ({"add_space_prefix": False}, "ab", ["<s>", "a", "b"], "ab"),
        ({"add_space_prefix": False}, " ab", ["<s>", "▁a", "b"], " ab"),
        ({"add_bos_token": False, "add_eos_token": True}, "a", ["▁a", "</s>"], "a"),
    ],
)
def test_the_space_before_a_text_is_as_the_file_says(
    keys: dict[str, bool],
    text: str,
    expected: list[str],
    decoded: str,
    write_tokenizer_gguf: Callable[..., Path],
) -> None:
    path = write_tokenizer_gguf(
        "llama",
        PIECES,
        scores=[0.0, 0.0, 0.0, -5.0, -3.0, -4.0, -1.0, -6.0],
        token_type=[2, 3, 3, 1, 1, 1, 1, 1],
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
        **keys,
    )
    tokenizer = load(path)
    found = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(found) == expected
    assert tokenizer.decode(found, skip_special_tokens=True) == decoded


def test_the_default_model_cuts_digits_from_the_spaces_before_them(tokenizer_directory: Path) -> None:
    """As llama.cpp does for it; transformers' conversion makes two tokens of two spaces before a digit."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    assert tokenizer.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]
