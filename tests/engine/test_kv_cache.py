"""A KV cache of 8 bits, on the real model."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer

from fastserve.checkpoints.kv_cache_scheme import KVCacheShapes, KVScales
from fastserve.checkpoints.model_files import ModelFiles
from fastserve.corpus.windows import evaluation_text, token_windows
from fastserve.engine.model_runner import ModelRunner
from fastserve.models.causal_lm import CausalLM
from fastserve.models.kv_cache import KV_CACHE_DTYPES
from fastserve.types import Outcome

PROMPTS = (
    "The capital of France is Paris. The capital of Italy is",
    "Once upon a time there was a king who had three daughters, and the youngest of them",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
)
DTYPES = tuple(KV_CACHE_DTYPES)
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
        engine.add(helpers.make_add(str(index), prompt, **sampling))
    outputs = helpers.run_until_idle(engine)
    return [helpers.tokens_of(outputs[str(index)]) for index in range(len(prompts))]


def mean_loss(engine: Any, helpers: Any, windows: torch.Tensor) -> float:
    """The loss of the windows' tokens, each after those before it."""
    losses = []
    for index, window in enumerate(windows.tolist()):
        engine.add(helpers.make_add(str(index), window, max_tokens=1, prompt_logprobs=0))
    for outputs in helpers.run_until_idle(engine).values():
        losses += [-entries[0][1] for entries in outputs[0].prompt_logprobs if entries]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("dtype", KV_CACHE_DTYPES.values())
def test_the_same_bytes_hold_twice_the_tokens_of_bf16(dtype: torch.dtype) -> None:
    class Model:
        device = torch.device("cpu")

        def kv_cache_shapes(self, num_blocks: int, block_size: int) -> KVCacheShapes:
            return [((num_blocks, block_size, 2, 64), (num_blocks, block_size, 2, 64))] * 3

    def runner(kv_dtype: torch.dtype, scales: list[KVScales] | None) -> ModelRunner:
        return ModelRunner(cast(CausalLM, Model()), 16, 1 << 20, kv_dtype, scales)

    scales = [KVScales(torch.ones(2), torch.ones(2))] * 3
    found, full = runner(dtype, scales), runner(torch.bfloat16, None)
    assert found.num_blocks in (2 * full.num_blocks, 2 * full.num_blocks + 1)
    sizes = [cache.keys.nbytes + cache.values.nbytes for cache in found.kv_caches]
    assert (1 << 20) - sum(sizes) in range(sum(sizes) // found.num_blocks)


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
    engine, long = engines[dtype], [[token for prompt in prompts for token in prompt]]
    first = texts(engine, helpers, long, **GREEDY)
    hits = engine.stats().prefix_cache_hit_tokens_total
    assert texts(engine, helpers, long, **GREEDY) == first
    assert engine.stats().prefix_cache_hit_tokens_total > hits


@pytest.mark.parametrize("dtype", DTYPES)
def test_preempted_sequences_go_on_with_the_same_text(
    engines: dict[str, Any], make_engine: Any, helpers: Any, prompts: list[list[int]], dtype: str
) -> None:
    bytes_per_token = 30 * 2 * 3 * 64
    settings = {"kv_cache_bytes": 128 * bytes_per_token, "speculative_method": "none"}
    small = make_engine(kv_cache_dtype=dtype, **settings)  # whose preemptions do not depend on times
    expected = texts(engines[dtype], helpers, prompts, **GREEDY)
    assert texts(small, helpers, prompts, **GREEDY) == expected
    assert small.stats().preemptions_total > 0
    assert small.stats().kv_blocks_used == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cancelled_request_gives_its_blocks_back(
    engines: dict[str, Any], helpers: Any, prompts: list[list[int]], dtype: str
) -> None:
    engine = engines[dtype]
    engine.add(helpers.make_add("gone", prompts[0], **GREEDY))
    engine.step()
    assert engine.stats().kv_blocks_used > 0
    engine.cancel("gone", Outcome.CANCELLED)
    helpers.run_until_idle(engine)
    assert engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_perplexity_hardly_rises(
    engines: dict[str, Any], helpers: Any, default_model: ModelFiles, soak: bool, dtype: str
) -> None:
    """A few windows tell no more than a percent from nothing."""
    samples, bound = (40, 0.005) if soak else (6, 0.015)
    windows = token_windows(default_model.tokenizer, evaluation_text(), 512, samples)
    exact, found = (mean_loss(engines[name], helpers, windows) for name in ("auto", dtype))
    assert math.exp(found - exact) - 1 <= bound
