"""Preempted streams are untouched: over a tiny real model, greedy text under random preemptions, and with
speculation, is that of an engine that preempts nobody and computes token by token: none lost or repeated."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.models.conftest import SIZES as TINY
from transformers import AutoConfig, AutoModelForCausalLM

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import Config
from fastserve.engine.engine_loader import load_engine
from fastserve.scheduling.preemption import PreemptionKind
from fastserve.types import Add

VOCAB, BLOCK, BLOCKS = 49152, 8, 20
"""The tokenizer is the default model's: with its text the scales of 8 bits are measured."""
SIZES = {**TINY, "vocab_size": VOCAB}
BYTES_PER_BLOCK = BLOCK * 3 * 2 * 2 * 12
"""Of 8 bits each element: 3 layers, keys and values, 2 heads of 12."""

requests = st.lists(
    st.tuples(
        st.integers(1, 70),  # tokens of the prompt
        st.integers(1, 30),  # tokens of the answer
        st.integers(-2, 2),  # priority
        st.integers(0, 6),  # steps after the one before
    ),
    min_size=4,
    max_size=10,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("model")
    saved = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    for parameter in saved.parameters():  # logits far from one another: rounding decides no token
        parameter.data *= 4 if parameter.dim() > 1 else 1
    saved.save_pretrained(directory)
    return directory


Load = Callable[..., Any]


@pytest.fixture(scope="module")
def load(model: Path, tokenizer_directory: Path) -> Load:
    def load(
        kv_dtype: str, prefix_caching: bool, method: str, num_blocks: int, num_host_blocks: int = 0
    ) -> Any:
        bytes_per_block = BYTES_PER_BLOCK * (4 if kv_dtype == "auto" else 1)
        config = Config(
            dtype="float32",
            device="cpu",
            block_size=BLOCK,
            kv_cache_bytes=num_blocks * bytes_per_block,
            swap_space_bytes=num_host_blocks * bytes_per_block,
            kv_cache_dtype=kv_dtype,  # type: ignore[arg-type]
            enable_prefix_caching=prefix_caching,
            max_num_seqs=4,
            max_num_batched_tokens=48,
            num_threads=1,
            speculative_method=method,  # type: ignore[arg-type]
        )
        return load_engine(config, ModelFiles(model, tokenizer_directory), has_common_queue=True)

    return load


@pytest.mark.parametrize("num_host_blocks", [0, 200], ids=["recompute", "swap"])
@pytest.mark.parametrize("prefix_caching", [True, False], ids=["shared prefixes", "own blocks"])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
def test_greedy_text_is_the_unpreempted_one(
    load: Load, helpers: Any, kv_dtype: str, prefix_caching: bool, num_host_blocks: int
) -> None:
    calm = load(kv_dtype, prefix_caching, "none", 400)
    busy = helpers.always_speculate(load(kv_dtype, prefix_caching, "ngram", BLOCKS, num_host_blocks))

    @settings(max_examples=12, phases=[Phase.explicit, Phase.generate], database=None)
    @given(requests, st.integers(0, 2**32))
    def check(shapes: list[tuple[int, int, int, int]], seed: int) -> None:
        rng = random.Random(seed)
        texts: dict[str, list[int]] = {}
        waiting: list[tuple[str, int]] = []

        def step() -> None:
            """A step; then some of those that wait are resumed, in any order."""
            output = busy.step()
            for each in output.outputs:
                assert each.failure is None
                texts[each.uid] += each.token_ids
            waiting.extend((view.uid, view.index) for view in output.preempted)
            rng.shuffle(waiting)
            for _ in range(rng.randint(0, len(waiting)) if busy.has_work else len(waiting)):
                busy.resume(*waiting.pop())

        messages: list[Add] = []
        for number, (num_prompt, num_output, priority, pause) in enumerate(shapes):
            prompt = [rng.randrange(VOCAB) for _ in range(num_prompt)]
            if rng.random() < 0.5 and messages:  # a prefix in common
                prompt = messages[-1].request.prompt_token_ids[:40] + prompt[:30]
            sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": num_output, "ignore_eos": True}
            messages.append(helpers.make_add(f"{number}", prompt, priority, **sampling))
            texts[f"{number}"] = []
            busy.add(messages[-1])
            for _ in range(pause):
                step()
        while busy.has_work or waiting:
            step()
        for message in messages:
            calm.add(Add(replace(message.request)))
            expected = helpers.tokens_of(helpers.run_until_idle(calm)[message.request.uid])
            assert texts[message.request.uid] == expected
        assert busy.stats().kv_blocks_used == 0

    check()
    kind = PreemptionKind.SWAP if num_host_blocks else PreemptionKind.RECOMPUTE
    assert busy.stats().resumptions_total[kind.value] > 0
    assert calm.stats().preemptions_total == 0
    assert busy.stats().accepted_tokens_total > 0
    assert calm.stats().draft_tokens_total == 0
