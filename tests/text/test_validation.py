"""Ids beyond the model's vocabulary, which end a worker, are refused by name wherever they come from."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from fastserve.config import Config
from fastserve.errors import RequestError
from fastserve.text.input_processor import InputProcessor
from fastserve.text.tokenizer import Tokenizer

TEXT = "日 本"
"""The last token of the tokenizer in `conftest.py`, which the model of these tests lacks."""


@pytest.fixture
def model_size(tokenizer: Tokenizer) -> int:
    assert tokenizer.encode(TEXT, special_tokens=False) == [tokenizer.vocab_size - 1]
    return tokenizer.vocab_size - 1


@pytest.fixture
def input_processor(tokenizer: Tokenizer, model_size: int) -> InputProcessor:
    return InputProcessor(Config(), tokenizer, 64, model_size)


@pytest.mark.parametrize(
    ("field", "inputs"),
    [
        ("text_input", {"text_input": f"a {TEXT}"}),
        ("messages", {"messages": [{"role": "user", "content": TEXT}]}),
        ("prompt_token_ids", {"prompt_token_ids": [5, "beyond"]}),
        ("logit_bias", {"text_input": "a", "sampling_parameters": {"logit_bias": {"beyond": 1.0}}}),
        ("stop_token_ids", {"text_input": "a", "sampling_parameters": {"stop_token_ids": ["beyond"]}}),
        ("bad_words", {"text_input": "a", "sampling_parameters": {"bad_words": [TEXT]}}),
        ("guided_decoding", {"text_input": "a", "sampling_parameters": {"guided_decoding": {"regex": "a"}}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ids_beyond_the_model_are_refused(
    input_processor: InputProcessor, model_size: int, field: str, inputs: dict[str, Any]
) -> None:
    with pytest.raises(RequestError) as raised:
        input_processor.check_guide(input_processor.parse(_filled_in(inputs, model_size), {}, now=0.0))
    message = str(raised.value)
    assert message.startswith(f"`{field}`: ")
    assert f"the tokenizer has {model_size + 1} tokens, more than the model's {model_size}" in message


def test_every_id_of_the_model_is_served(input_processor: InputProcessor, model_size: int) -> None:
    request = input_processor.check_guide(
        input_processor.parse({"prompt_token_ids": [0, model_size - 1]}, {"top_k": 10**6}, now=0.0)
    )
    assert request.prompt_token_ids == [0, model_size - 1]
    assert request.sampling.top_k == model_size


def test_the_first_lines_of_the_log_tell(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    size = tokenizer.vocab_size
    with caplog.at_level(logging.WARNING):
        InputProcessor(Config(), tokenizer, 64, size + 100)  # a padded model is as usual
        assert caplog.messages == []
        InputProcessor(Config(), tokenizer, 64, size - 1)
    assert len(caplog.messages) == 1
    assert f"{size} tokens, more than the model's {size - 1}" in caplog.messages[0]


def _filled_in(value: Any, beyond: int) -> Any:
    """`value` with the id `beyond` wherever it says so."""
    if isinstance(value, dict):
        return {
            str(beyond) if key == "beyond" else key: _filled_in(item, beyond) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_filled_in(item, beyond) for item in value]
    return beyond if value == "beyond" else value
