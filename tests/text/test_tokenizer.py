"""The tokenizer: special tokens once, end tokens, directories that hold none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastserve.config import ConfigError
from fastserve.text.chat import Chat
from fastserve.text.tokenizer import Tokenizer

SaveTokenizer = Callable[..., Path]
MESSAGES = [{"role": "user", "content": "hello"}]


def test_prompt_gets_the_special_tokens_and_a_chat_only_its_own(tokenizer: Tokenizer) -> None:
    start = tokenizer.backend.token_to_id("<s>")
    assert tokenizer.encode("hello")[0] == start
    chat = tokenizer.chat_template.render(Chat(MESSAGES))
    assert chat == "<s>user\nhello</s>\n<s>assistant\n"
    assert tokenizer.encode(chat, special_tokens=False).count(start) == 2


def test_decode_skips_special_tokens_or_not(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello</s>")
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>hello</s>"


def test_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == tokenizer.backend.get_vocab_size(with_added_tokens=True)
    assert tokenizer.eos_token_ids == [tokenizer.backend.token_to_id("</s>")]
    assert tokenizer.token_text(tokenizer.eos_token_ids[0]) == "</s>"


@pytest.mark.parametrize(
    ("kind", "token", "expected"),
    [
        ("byte_level", "hello", "hello"),
        ("byte_level", "Ġw", " w"),
        ("byte_level", "Ã", "\N{REPLACEMENT CHARACTER}"),
        ("byte_fallback", "▁a", " a"),
        ("byte_fallback_strip", "▁a", " a"),
        ("byte_fallback_strip", "▁▁▁", "   "),
        ("byte_fallback_strip", "a", "a"),
        ("byte_fallback_strip", "<0x41>", "A"),
        ("byte_fallback_strip", "<0xE2>", "\N{REPLACEMENT CHARACTER}"),
        ("byte_fallback_strip", "</s>", "</s>"),
        ("metaspace", "▁b", " b"),
        ("word_piece", "##d", "d"),
        ("word_piece", "not", " not"),
        ("no_decoder", "not", " not"),
    ],
)
def test_what_one_token_adds_to_a_text(
    kind: str, token: str, expected: str, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.token_text(tokenizer.backend.token_to_id(token)) == expected


def test_end_tokens_of_the_generation_config(tokenizer: Tokenizer, save_tokenizer: SaveTokenizer) -> None:
    directory = save_tokenizer()
    (directory / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert Tokenizer(directory).eos_token_ids == [3, 5, *tokenizer.eos_token_ids]
    assert Tokenizer(directory, eos_token_ids=[7]).eos_token_ids == [7]


def test_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`model`: no tokenizer could be read from"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "Nonsense"}}', b"\xff".decode("latin-1")])
def test_directory_with_a_broken_tokenizer(save_tokenizer: SaveTokenizer, content: str) -> None:
    directory = save_tokenizer()
    (directory / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"`model`: no tokenizer could be read from"):
        Tokenizer(directory)
