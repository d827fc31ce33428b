"""Chat templates that are absent, or that refuse a chat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastserve.errors import RequestError
from fastserve.text.chat import Chat
from fastserve.text.tokenizer import Tokenizer

SaveTokenizer = Callable[..., Path]
MESSAGES = [{"role": "user", "content": "hello"}]


def test_chat_without_a_template(save_tokenizer: SaveTokenizer) -> None:
    tokenizer = Tokenizer(save_tokenizer(chat_template=None))
    with pytest.raises(RequestError, match=r"`messages`: this model has no chat template"):
        tokenizer.chat_template.names(None)


def test_chat_that_the_template_refuses(save_tokenizer: SaveTokenizer) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = Tokenizer(save_tokenizer(chat_template=template))
    with pytest.raises(RequestError, match=r"`messages`: .*roles must alternate"):
        tokenizer.chat_template.render(Chat(MESSAGES))
