"""A model's chat template: the program in its tokenizer's files that makes a prompt of a chat."""

from __future__ import annotations

from typing import Any

from fastserve.errors import RequestError
from fastserve.text.chat import Chat, TemplateNames, template_names

_MAX_ERROR_LENGTH = 500


class ChatTemplate:
    """The chat template of a tokenizer of transformers, which may have several, or none."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: a PreTrainedTokenizerFast."""
        self._tokenizer = tokenizer

    def names(self, tools: list[Any] | None) -> TemplateNames:
        """The names in the template that is taken for a chat with these tools. Raises as `source` does."""
        return template_names(self.source(tools))

    def source(self, tools: list[Any] | None) -> str:
        """The template that is taken for a chat with these tools.

        Raises RequestError where the model has no chat template.
        """
        if self._tokenizer.chat_template is None:
            raise RequestError("`messages`: this model has no chat template; allowed: `text_input`")
        try:
            return str(self._tokenizer.get_chat_template(tools=tools))
        except ValueError as error:
            raise RequestError(f"`messages`: the model has no chat template for them: {error}") from error

    def render(self, chat: Chat) -> str:
        """The prompt text of a chat. Raises RequestError where the template refuses it."""
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    chat.messages,
                    tools=chat.tools,
                    add_generation_prompt=chat.add_generation_prompt,
                    continue_final_message=chat.continue_final_message,
                    tokenize=False,
                    **chat.template_kwargs,
                )
            )
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            said = f"{type(error).__name__}: {error}"[:_MAX_ERROR_LENGTH]
            raise RequestError(f"`messages`: the model's chat template refuses them: {said}") from error
