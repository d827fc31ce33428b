"""Prompts as token ids, for clients that count or look at them: those that `InputProcessor` makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastserve.errors import invalid
from fastserve.text.chat import parse_chat
from fastserve.text.tokenizer import Tokenizer


class PromptTokenizer:
    """A tokenizer with its chat template. Threads may share one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def text_token_ids(self, text: str, special_tokens: bool) -> list[int]:
        """Of a text; `special_tokens`: with those that the tokenizer puts around one."""
        return self._tokenizer.encode(text, special_tokens=special_tokens)

    def chat_token_ids(self, messages: object, options: Mapping[str, Any], special_tokens: bool) -> list[int]:
        """Of a chat as the model's template renders it; `options`: CHAT_OPTIONS. Raises RequestError."""
        template = self._tokenizer.chat_template
        chat = parse_chat(messages, options, template.names)
        return self._tokenizer.encode(template.render(chat), special_tokens=special_tokens)

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of ids, special tokens included. Raises RequestError for an id that has none."""
        for place, token_id in enumerate(token_ids):
            if token_id not in self._tokenizer.token_ids:
                raise invalid(f"tokens[{place}]", token_id, f"a token id below {self._tokenizer.vocab_size}")
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """What each token adds to a text."""
        return [self._tokenizer.token_text(token_id) for token_id in token_ids]
