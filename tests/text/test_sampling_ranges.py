"""Sampling parameters that are accepted lie in their documented ranges, whatever came."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastserve.config import Config
from fastserve.errors import RequestError
from fastserve.text.input_processor import InputProcessor
from fastserve.text.tokenizer import Tokenizer
from fastserve.types import Request, SamplingParams, decode, encode

MAX_MODEL_LEN = 64
VOCAB_SIZE = 267


@pytest.fixture(scope="module")
def input_processor(tokenizer: Tokenizer) -> InputProcessor:
    assert tokenizer.vocab_size == VOCAB_SIZE
    return InputProcessor(Config(), tokenizer, MAX_MODEL_LEN, VOCAB_SIZE)


def _forms(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Each value as itself and as the text that says it."""
    return values | values.map(lambda value: value if isinstance(value, str) else json.dumps(value))


INTEGERS = st.integers(-3, 70) | st.sampled_from([2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400])
FLOATS = st.floats() | st.floats(-2.5, 101) | INTEGERS | st.sampled_from([5e-324, 1e-5, 9e-6, -0.0, 1e300])
TEXTS = st.lists(st.text(max_size=3) | st.sampled_from(["x" * 256, "x" * 257, "\0", " ", "</s>"]), max_size=3)
NEAR_THE_BOUNDS = st.fixed_dictionaries(
    {},
    optional={
        **{name: _forms(INTEGERS) for name in ("n", "max_tokens", "min_tokens", "top_k", "seed")},
        **{name: _forms(INTEGERS) for name in ("logprobs", "prompt_logprobs")},
        **{name: _forms(FLOATS) for name in ("temperature", "top_p", "min_p", "repetition_penalty")},
        **{name: _forms(FLOATS) for name in ("presence_penalty", "frequency_penalty")},
        "stop": _forms(TEXTS) | st.text(max_size=3),
        "bad_words": _forms(TEXTS),
        "stop_token_ids": _forms(st.lists(INTEGERS | st.sampled_from([266, 267]), max_size=3)),
        "logit_bias": st.dictionaries(INTEGERS.map(str) | st.text(max_size=2), FLOATS, max_size=3),
    },
)
RANGES: dict[str, Callable[[Any], bool]] = {
    "n": lambda n: 1 <= n <= 64,
    "max_tokens": lambda n: 1 <= n < MAX_MODEL_LEN,
    "min_tokens": lambda n: 0 <= n < MAX_MODEL_LEN,
    "temperature": lambda x: x == 0 or 1e-5 <= x <= 100,
    "top_p": lambda x: 0 < x <= 1,
    "top_k": lambda n: -1 <= n <= VOCAB_SIZE,
    "min_p": lambda x: 0 <= x <= 1,
    "repetition_penalty": lambda x: 0.01 <= x <= 100,
    "presence_penalty": lambda x: -2 <= x <= 2,
    "frequency_penalty": lambda x: -2 <= x <= 2,
    "seed": lambda n: n is None or (-(2**63) <= n < 2**63 and n != -1),
    "stop": lambda texts: all(1 <= len(text) <= 256 for text in texts),
    "stop_token_ids": lambda ids: all(0 <= i < VOCAB_SIZE for i in ids),
    "include_stop_str_in_output": lambda x: x is False,
    "ignore_eos": lambda x: x is False,
    "logprobs": lambda n: n is None or 0 <= n <= 20,
    "prompt_logprobs": lambda n: n is None or 0 <= n <= 20,
    "logit_bias": lambda bias: all(0 <= i < VOCAB_SIZE and -100 <= x <= 100 for i, x in bias.items()),
    "bad_words": lambda texts: all(1 <= len(text) <= 256 for text in texts),
    "skip_special_tokens": lambda x: x is True,
    "guide": lambda x: x is None,
}


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=NEAR_THE_BOUNDS)
def test_what_is_accepted_lies_in_its_range(input_processor: InputProcessor, values: dict[str, Any]) -> None:
    request = None
    with contextlib.suppress(RequestError):
        inputs = {"text_input": "hello", "sampling_parameters": values}
        request = input_processor.check_guide(input_processor.parse(inputs, {}, now=0.0))
    if request is not None:
        assert decode(encode(request), Request) == request
        for name in SamplingParams.__struct_fields__:
            assert RANGES[name](getattr(request.sampling, name)), name
        assert request.sampling.min_tokens <= request.sampling.max_tokens
        assert all(ids and max(ids) < VOCAB_SIZE for ids in request.bad_words_token_ids)
