"""A KV cache of 8 bits, on the real model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from fastserve.compression.text import evaluation_text, token_windows
from fastserve.engine.kv_scales import choose_kv_cache, measure_scales
from fastserve.model_files import ModelFiles
from fastserve.models.kv_cache import LARGEST
from fastserve.models.loading import load_model

PROMPTS = (
    "The capital of France is Paris. The capital of Italy is",
    "Once upon a time there was a king who had three daughters, and the youngest of them",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
)
DTYPES = ("int8", "fp8")
SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 42, "max_tokens": 48, "ignore_eos": True}
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 48, "ignore_eos": True}


@pytest.fixture(scope="module")
def prompts(default_model: ModelFiles) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(default_model.tokenizer / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


@pytest.fixture(scope="module")
def engines(make_engine: Any) -> dict[str, Any]:
    return {dtype: make_engine(kv_cache_dtype=dtype) for dtype in ("auto", *DTYPES)}


def texts(engine: Any, helpers: Any, prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
    """What the engine makes of the prompts together."""
    for index, prompt in enumerate(prompts):
        engine.add(helpers.make_request(str(index), prompt, **sampling))
    outputs = helpers.run_until_idle(engine)
    return [helpers.tokens_of(outputs[str(index)]) for index in range(len(prompts))]


def mean_loss(engine: Any, helpers: Any, windows: torch.Tensor) -> float:
    """Of the windows' tokens, each after those before it."""
    losses = []
    for index, window in enumerate(windows.tolist()):
        engine.add(helpers.make_request(str(index), window, max_tokens=1, prompt_logprobs=0))
    for outputs in helpers.run_until_idle(engine).values():
        losses += [-entries[0].logprob for entries in outputs[0].prompt_logprobs]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bytes_hold_twice_the_tokens_of_bf16(make_engine: Any, dtype: str) -> None:
    settings: dict[str, Any] = {"dtype": "bfloat16", "kv_cache_bytes": 1 << 26}
    blocks = make_engine(**settings).stats().kv_blocks_total
    assert make_engine(kv_cache_dtype=dtype, **settings).stats().kv_blocks_total in (
        2 * blocks,
        2 * blocks + 1,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_seed_gives_the_same_text_alone_and_in_a_batch(
    engines: dict[str, Any], helpers: Any, prompts: list[list[int]], dtype: str
) -> None:
    alone = [texts(engines[dtype], helpers, [prompt], **SEEDED)[0] for prompt in prompts]
    assert texts(engines[dtype], helpers, prompts, **SEEDED) == alone


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cached_prefix_gives_the_same_text(
    engines: dict[str, Any], helpers: Any, prompts: list[list[int]], dtype: str
) -> None:
    engine, long = engines[dtype], [sum(prompts, [])]
    first = texts(engine, helpers, long, **GREEDY)
    hits = engine.stats().prefix_cache_hit_tokens_total
    assert texts(engine, helpers, long, **GREEDY) == first
    assert engine.stats().prefix_cache_hit_tokens_total > hits


@pytest.mark.parametrize("dtype", DTYPES)
def test_preempted_sequences_go_on_with_the_same_text(
    engines: dict[str, Any], make_engine: Any, helpers: Any, prompts: list[list[int]], dtype: str
) -> None:
    bytes_per_token = 30 * 2 * 3 * 64
    small = make_engine(kv_cache_dtype=dtype, kv_cache_bytes=128 * bytes_per_token)
    expected = texts(engines[dtype], helpers, prompts, **GREEDY)
    assert texts(small, helpers, prompts, **GREEDY) == expected
    assert small.stats().preemptions_total > 0
    assert small.stats().kv_blocks_used == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cancelled_request_gives_its_blocks_back(
    engines: dict[str, Any], helpers: Any, prompts: list[list[int]], dtype: str
) -> None:
    from fastserve.types import Outcome

    engine = engines[dtype]
    engine.add(helpers.make_request("gone", prompts[0], **GREEDY))
    engine.step()
    assert engine.stats().kv_blocks_used > 0
    engine.cancel("gone", Outcome.CANCELLED)
    helpers.run_until_idle(engine)
    assert engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_text_begins_as_that_of_a_cache_of_full_precision(
    engines: dict[str, Any], helpers: Any, prompts: list[list[int]], dtype: str
) -> None:
    expected = texts(engines["auto"], helpers, prompts, **GREEDY)
    found = texts(engines[dtype], helpers, prompts, **GREEDY)
    assert [tokens[:8] for tokens in found] == [tokens[:8] for tokens in expected]


@pytest.mark.parametrize("dtype", DTYPES)
def test_perplexity_hardly_rises(
    engines: dict[str, Any], helpers: Any, default_model: ModelFiles, soak: bool, dtype: str
) -> None:
    """A few windows tell no more than a percent from nothing."""
    samples, bound = (40, 0.005) if soak else (6, 0.015)
    windows = token_windows(default_model.tokenizer, evaluation_text(), 512, samples)
    exact, found = (mean_loss(engines[name], helpers, windows) for name in ("auto", dtype))
    assert math.exp(found - exact) - 1 <= bound
