"""In fp32 the engine's greedy tokens are those of transformers' `generate`, however requests are batched."""

from __future__ import annotations

import pydoc_data.topics
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

NEW_TOKENS = 24
SMALL, FULL = 8, 50


@pytest.fixture(scope="module")
def prompts(tokenizer_directory: Path, soak: bool) -> list[list[int]]:
    """Pieces of English text of 5 to 700 tokens."""
    tokenizer = Tokenizer.from_file(str(tokenizer_directory / "tokenizer.json"))
    token_ids = tokenizer.encode(" ".join(pydoc_data.topics.topics.values())[:400_000]).ids
    numbers = random.Random(0)
    count = FULL if soak else SMALL
    lengths = [5, 700, *(int(5 * 140 ** numbers.random()) for _ in range(count - 2))]
    starts = [numbers.randrange(len(token_ids) - length) for length in lengths]
    return [token_ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]], transformers_model: Any) -> list[list[int]]:
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = transformers_model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=-1,
            pad_token_id=0,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def answers(engine: Any, helpers: Any, prompts: list[list[int]], together: bool = True) -> list[list[int]]:
    outputs: dict[str, Any] = {}
    for index, prompt in enumerate(prompts):
        engine.add(
            helpers.make_add(str(index), prompt, temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
        )
        if not together:
            outputs |= helpers.run_until_idle(engine)
    outputs |= helpers.run_until_idle(engine)
    return [helpers.tokens_of(outputs[str(index)]) for index in range(len(prompts))]


@pytest.mark.parametrize("together", [False, True], ids=["one at a time", "all at once"])
def test_batching(make_engine: Any, helpers: Any, prompts: Any, expected: Any, together: bool) -> None:
    engine = make_engine(max_num_seqs=64, enable_prefix_caching=False)
    assert answers(engine, helpers, prompts, together) == expected


def test_preemption(make_engine: Any, helpers: Any, prompts: Any, expected: Any) -> None:
    bytes_per_token = 30 * 2 * 3 * 64 * 4
    settings = {"kv_cache_bytes": 736 * bytes_per_token, "speculative_method": "none"}
    engine = make_engine(**settings)  # whose preemptions do not depend on times
    assert answers(engine, helpers, prompts) == expected
    stats = engine.stats()
    assert stats.preemptions_total > 0
    assert stats.kv_blocks_used == 0


def test_warm_prefix_cache(make_engine: Any, helpers: Any, prompts: Any, expected: Any) -> None:
    engine = make_engine(kv_cache_bytes=1 << 30)
    answers(engine, helpers, prompts)
    computed_once = engine.stats().prefix_cache_hit_tokens_total
    assert answers(engine, helpers, prompts) == expected
    hits = engine.stats().prefix_cache_hit_tokens_total - computed_once
    assert hits >= sum((len(prompt) - 1) // 16 * 16 for prompt in prompts)


def test_chunked_prefill(make_engine: Any, helpers: Any, prompts: Any, expected: Any) -> None:
    engine = make_engine(max_num_seqs=16, max_num_batched_tokens=32)
    assert answers(engine, helpers, prompts) == expected
