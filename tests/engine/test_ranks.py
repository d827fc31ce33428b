"""Several processes compute the default model: its tokens are those of one, until a process ends."""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch

from fastserve.config import Config, ConfigError, check_ranks
from fastserve.scheduling.sequence import StepPlan
from fastserve_kernels.attention_metadata import AttentionMetadata
from fastserve_kernels.process_group import RankLostError

NEW_TOKENS = 40
SPLITS: dict[str, dict[str, int]] = {
    "TP 3": {"tensor_parallel_size": 3},
    "PP 2": {"pipeline_parallel_size": 2},
    "TP 3 x PP 2": {"tensor_parallel_size": 3, "pipeline_parallel_size": 2},
}
BYTES_PER_TOKEN = 30 * 2 * 3 * 64 * 4
SETTINGS: dict[str, Any] = {
    "num_threads": 1,
    "kv_cache_bytes": 400 * BYTES_PER_TOKEN,
    "max_num_batched_tokens": 96,
    "max_num_seqs": 3,  # of six: the later ones, of higher priority, take the place of others
}


@pytest.fixture(scope="module", params=SPLITS)
def ranked(request: Any, make_engine: Any) -> Iterator[Any]:
    engine = make_engine(**SPLITS[request.param], **SETTINGS)
    yield engine
    engine.runner._ranks.close()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [
        [7 + number * 13 + position * position % 900 for position in range(5 + 16 * number)]
        for number in range(6)
    ]


def answers(engine: Any, helpers: Any, prompts: list[list[int]], **sampling: Any) -> list[Any]:
    outputs: dict[str, list[Any]] = {}
    for number, prompt in enumerate(prompts):
        parameters = {"temperature": 0.0, "max_tokens": NEW_TOKENS, "ignore_eos": True, **sampling}
        engine.add(helpers.make_add(str(number), prompt, number, **parameters))
        for output in engine.step().outputs:
            outputs.setdefault(output.uid, []).append(output)
    for uid, left in helpers.run_until_idle(engine).items():
        outputs.setdefault(uid, []).extend(left)
    return [outputs[str(number)] for number in range(len(prompts))]


def test_tokens_are_those_of_one(make_engine: Any, ranked: Any, helpers: Any, prompts: Any) -> None:
    """In chunks, preempted, from the prefix cache, with guesses; and alone."""
    one = make_engine(**SETTINGS)
    expected = [helpers.tokens_of(each) for each in answers(one, helpers, prompts)]
    for _ in range(2):
        assert [helpers.tokens_of(each) for each in answers(ranked, helpers, prompts)] == expected
    assert ranked.stats().preemptions_total > 0
    assert ranked.stats().prefix_cache_hit_tokens_total > 0
    assert ranked.runner.num_blocks == one.runner.num_blocks
    for prompt, tokens in zip(prompts[1:3], expected[1:3], strict=True):
        (alone,) = answers(ranked, helpers, [prompt])
        assert helpers.tokens_of(alone) == tokens


def test_blocks_go_to_host_memory_and_back_on_all_ranks(ranked: Any, helpers: Any, prompts: Any) -> None:
    """The tokens that follow a prompt whose cached blocks were away and came back to other places."""
    runner, ids = ranked.runner, torch.tensor(prompts[3][:40])
    scores: list[torch.Tensor] = []
    for tables in ([[0, 1, 2]], [[5, 6, 7]]):
        if not scores:
            runner.forward(ids[:32], AttentionMetadata.build([32], [32], tables, 16, "cpu"))
        else:
            runner.copy_blocks(StepPlan([], [], copies_out=[(0, 3), (1, 4)]))
            runner.copy_blocks(StepPlan([], [], copies_in=[(3, 5), (4, 6)]))
        hidden = runner.forward(ids[32:], AttentionMetadata.build([8], [40], tables, 16, "cpu"))
        scores.append(runner.logits(hidden[-1:]))
    assert torch.equal(*scores)


def test_log_probabilities_are_those_of_one(
    make_engine: Any, ranked: Any, helpers: Any, prompts: Any
) -> None:
    """Of prompts, too: their rows of hidden states go to all ranks."""
    found = []
    for engine in (make_engine(**SETTINGS), ranked):
        (outputs,) = answers(engine, helpers, prompts[1:2], logprobs=2, prompt_logprobs=2, max_tokens=2)
        entries = [
            entry for each in outputs for entry in (*(each.prompt_logprobs or ()), *each.logprobs) if entry
        ]
        found.append([each[1] for entry in entries for each in entry])
    assert len(found[0]) > len(prompts[1])
    assert found[1] == pytest.approx(found[0], abs=1e-3)


def test_the_group_ends_with_a_rank(ranked: Any, helpers: Any, prompts: Any) -> None:
    processes = [psutil.Process(pid) for pid in ranked.runner._ranks.pids]
    assert len(processes) in (1, 2, 5)
    told: queue.SimpleQueue[Exception] = queue.SimpleQueue()
    ranked.on_loss(told.put)
    ranked.add(helpers.make_add("last", prompts[0], temperature=0.0, max_tokens=400, ignore_eos=True))
    ranked.step()
    start = time.monotonic()
    os.kill(processes[0].pid, signal.SIGKILL)
    with pytest.raises(RankLostError):
        helpers.run_until_idle(ranked)
    assert time.monotonic() - start < 2
    gone, alive = psutil.wait_procs(processes, timeout=10)
    assert (len(gone), alive) == (len(processes), [])
    assert "rank 1 ended (code -9)" in str(told.get(timeout=10))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tensor_parallel_size": 3}, "`tensor_parallel_size`: got 3 for 1 replica.s.; allowed: .* cores, 2"),
        ({"tensor_parallel_size": 2, "replicas": 2}, "got 2 for 2 replica"),
        ({"pipeline_parallel_size": 3}, "`pipeline_parallel_size`: got 3 in 3 stages for 1 replica"),
        ({"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, "got 2 in 2 stages for 1 replica"),
        (
            {"pipeline_parallel_size": 2, "device": "cuda:1"},
            "`device`: got 'cuda:1' for 2 ranks; allowed: cpu",
        ),
        ({"tensor_parallel_size": 2, "device": "cuda"}, "`device`: got 'cuda' for 2 ranks; allowed: cpu"),
        ({"pipeline_parallel_size": 2, "kv_cache_dtype": "int8"}, "got 'int8' for 2 stages; allowed: auto"),
        (
            {"tensor_parallel_size": 2, "num_threads": 2},
            "of 2 threads; allowed: .* fewer ranks, stages, replicas or",
        ),
    ],
)
def test_settings_that_ranks_cannot_have_are_refused(
    settings: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    check_ranks(Config(tensor_parallel_size=2))
    with pytest.raises(ConfigError, match=words):
        check_ranks(Config(**settings))
