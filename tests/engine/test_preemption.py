"""Sequences that the engine hands back wait elsewhere, and go on, here or there, as if nothing had been."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from fastserve.types import (
    Add,
    Guide,
    Outcome,
    Preemptions,
    RequestView,
    SequenceOutput,
    StepOutput,
    decode,
    encode,
)

VOCAB = 60
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "seeded": {"temperature": 1.0, "seed": 7, "max_tokens": 12},
    "without a seed": {"temperature": 1.0, "max_tokens": 12},
    "penalties": {**GREEDY, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 1.0},
    "bad words": {**GREEDY, "bad_words": [[token] for token in range(30)] + [[40, 41]]},
    "limits": {**GREEDY, "min_tokens": 6, "stop_token_ids": list(range(40))},
    "bias": {**GREEDY, "logit_bias": {3: 2.0, 5: -100.0}},
    "logprobs": {**GREEDY, "logprobs": 2},
}


class Replica:
    """An engine behind a common queue that the test plays; what has come of each request."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.outputs: dict[str, list[SequenceOutput]] = {}
        self.waiting: dict[tuple[str, int], RequestView] = {}

    def step(self) -> StepOutput:
        output = decode(encode(self.engine.step()), StepOutput)
        for each in output.outputs:
            self.outputs.setdefault(each.uid, []).append(each)
        self.waiting |= {(view.uid, view.index): view for view in output.preempted}
        for key in output.ended:
            del self.waiting[key]
        return output

    def resume_all(self) -> None:
        for uid, index in self.waiting:
            self.engine.resume(uid, index)
        self.waiting = {}

    def run(self) -> None:
        """Until nothing is left."""
        while self.engine.has_work or self.waiting:
            self.resume_all()
            self.step()


@pytest.fixture
def make_replica(fake_engine: Any) -> Any:
    def make(vocab_size: int = VOCAB, **settings: Any) -> Replica:
        return Replica(fake_engine(vocab_size, has_common_queue=True, **settings))

    return make


def expected_tokens(fake_engine: Any, helpers: Any, message: Add, **settings: Any) -> list[int]:
    """What comes of the request alone."""
    engine = fake_engine(VOCAB, **settings)
    engine.add(message)
    tokens: list[int] = helpers.tokens_of(helpers.run_until_idle(engine)[message.request.uid])
    return tokens


def preempt(replica: Replica, helpers: Any, uid: str, steps: int = 5) -> None:
    """Runs the request, which has the only place, for some steps, until another takes that and ends."""
    for _ in range(steps):
        replica.step()
    replica.engine.add(helpers.make_add("urgent", [1, 2, 3], 100, temperature=0.0, max_tokens=1))
    replica.step()
    assert [each.outcome for each in replica.outputs.pop("urgent")] == [Outcome.LENGTH]
    assert list(replica.waiting) == [(uid, 0)]
    assert not replica.engine.has_work
    assert replica.engine.num_preempted == 1


def test_what_gets_no_place_is_handed_back_and_goes_on_when_it_is_resumed(
    make_replica: Any, fake_engine: Any, helpers: Any
) -> None:
    replica = make_replica(max_num_seqs=1)
    message = helpers.make_add("a", [4, 5, 6], **GREEDY)
    replica.engine.add(message)
    preempt(replica, helpers, "a")
    view = replica.waiting["a", 0]
    assert (view.num_prompt_tokens, view.num_tokens, view.num_served_tokens) == (3, 8, 7)
    assert view.waiting_since is not None
    assert replica.step().outputs == []  # and nothing comes of it meanwhile
    replica.run()
    assert helpers.tokens_of(replica.outputs["a"]) == expected_tokens(fake_engine, helpers, message)
    assert replica.engine.stats().recomputed_tokens_total == 0
    assert replica.outputs["a"][-1].preemptions == Preemptions(1, 0, 0)


@pytest.mark.parametrize("host_blocks", [0, 64])
def test_the_last_output_says_what_preemptions_cost(
    make_replica: Any, helpers: Any, host_blocks: int
) -> None:
    """Another request takes its KV blocks, which then come back from host memory or are computed again."""
    replica = make_replica(max_num_seqs=1, num_blocks=4, block_size=4, num_host_blocks=host_blocks)
    replica.engine.add(helpers.make_add("a", [4, 5, 6], **GREEDY))
    for _ in range(6):
        replica.step()
    replica.engine.add(helpers.make_add("urgent", list(range(1, 14)), 100, temperature=0.0, max_tokens=1))
    replica.step()
    replica.run()
    stats, cost = replica.engine.stats(), replica.outputs["a"][-1].preemptions
    assert cost.count == stats.preemptions_total == 1
    assert cost.num_recomputed_tokens == stats.recomputed_tokens_total
    assert cost.num_swapped_tokens == 4 * stats.swapped_blocks_total
    assert cost.num_recomputed_tokens + cost.num_swapped_tokens > 0
    assert (cost.num_swapped_tokens > 0) == (host_blocks > 0)
    assert all(each.preemptions is None for each in replica.outputs["a"][:-1])


def test_all_that_comes_and_is_resumed_is_counted(make_replica: Any, helpers: Any) -> None:
    """The scheduler takes what is not counted for being on its way."""
    replica = make_replica(max_num_seqs=1)
    replica.engine.add(helpers.make_add("a", [4, 5, 6], **GREEDY))
    preempt(replica, helpers, "a")
    assert replica.engine.stats().received == 2
    replica.engine.resume("a", 0)
    replica.engine.resume("has ended", 0)
    replica.engine.resume("a", 0)
    assert replica.engine.stats().received == 5
    replica.waiting = {}
    replica.run()
    assert len(helpers.tokens_of(replica.outputs["a"])) == 12


def test_one_that_is_resumed_and_finds_no_place_is_handed_back_and_stops_nobody(
    make_replica: Any, helpers: Any
) -> None:
    replica = make_replica(max_num_seqs=2)
    for uid in ("a", "b", "late"):
        replica.engine.add(helpers.make_add(uid, [4, 5, 6], **GREEDY))
    for count in range(1, 13):
        assert list(replica.waiting) == ([] if count == 1 else [("late", 0)])
        replica.resume_all()
        replica.step()
        assert [len(helpers.tokens_of(replica.outputs[uid])) for uid in ("a", "b")] == [count, count]
    replica.run()
    assert len(helpers.tokens_of(replica.outputs["late"])) == 12
    assert replica.engine.stats().preemptions_total == 0


def test_a_prompt_longer_than_what_is_free_waits_without_taking_a_place(
    make_replica: Any, helpers: Any
) -> None:
    """Whether or not its rank is high enough to preempt one that would not make room enough."""
    replica = make_replica(num_blocks=16, block_size=4)
    for uid in ("a", "b"):
        replica.engine.add(helpers.make_add(uid, [4, 5, 6], 5, **GREEDY))
    replica.engine.add(helpers.make_add("low", [4, 5, 6], **GREEDY))
    replica.step()
    replica.engine.add(helpers.make_add("long", list(range(45)), 2, temperature=0.0, max_tokens=4))
    replica.run()
    lengths = {uid: len(helpers.tokens_of(outputs)) for uid, outputs in replica.outputs.items()}
    assert lengths == {"a": 12, "b": 12, "low": 12, "long": 4}


@pytest.mark.parametrize("outcome", [Outcome.CANCELLED, Outcome.STOP])
def test_a_preempted_one_that_is_stopped_ends_at_once(
    make_replica: Any, helpers: Any, outcome: Outcome
) -> None:
    replica = make_replica(max_num_seqs=1)
    replica.engine.add(helpers.make_add("a", [4, 5, 6], **GREEDY))
    preempt(replica, helpers, "a")
    replica.engine.cancel("a", outcome)
    assert replica.engine.has_work
    assert replica.step().ended == [("a", 0)]
    assert replica.outputs["a"][-1].outcome is outcome
    replica.engine.resume("a", 0)  # it was on its way
    replica.run()
    assert replica.engine.stats().kv_blocks_used == 0


def test_a_deadline_ends_a_preempted_one(make_replica: Any, helpers: Any) -> None:
    replica = make_replica(max_num_seqs=1)
    request = replace(helpers.make_request("a", [4, 5, 6], **GREEDY), deadline=time.monotonic() + 0.05)
    replica.engine.add(Add(request))
    preempt(replica, helpers, "a")
    while replica.waiting:
        replica.step()
    assert request.deadline is not None
    assert time.monotonic() >= request.deadline
    assert replica.outputs["a"][-1].outcome is Outcome.TIMEOUT


def test_several_sequences_wait_each_for_itself(make_replica: Any, fake_engine: Any, helpers: Any) -> None:
    sampling: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 3, "max_tokens": 12}
    alone = fake_engine(VOCAB)
    alone.add(helpers.make_add("a", [4, 5, 6, 7, 8], **sampling))
    expected = helpers.run_until_idle(alone)["a"]
    replica = make_replica(max_num_seqs=3)
    replica.engine.add(helpers.make_add("a", [4, 5, 6, 7, 8], **sampling))
    for _ in range(4):
        replica.step()
    for number in range(2):
        replica.engine.add(helpers.make_add(str(number), [1], 100, temperature=0.0, max_tokens=2))
    replica.step()
    assert set(replica.waiting) == {("a", 1), ("a", 2)}
    replica.engine.cancel("a", Outcome.STOP, 1)
    assert replica.step().ended == [("a", 1)]
    replica.run()
    stopped = helpers.tokens_of(replica.outputs["a"], 1)
    assert helpers.tokens_of(expected, 1)[: len(stopped)] == stopped
    for index in (0, 2):
        assert helpers.tokens_of(replica.outputs["a"], index) == helpers.tokens_of(expected, index)


def test_a_sequence_zero_that_is_preempted_in_its_prompt_takes_the_others_along(
    make_replica: Any, helpers: Any
) -> None:
    replica = make_replica(max_num_seqs=4, max_num_batched_tokens=4)
    replica.engine.add(helpers.make_add("a", list(range(20)), n=3, temperature=1.0, max_tokens=3))
    for _ in range(2):
        replica.step()
    for number in range(4):
        replica.engine.add(helpers.make_add(str(number), [1], 100, temperature=0.0, max_tokens=2))
    replica.step()
    assert ("a", 0) in replica.waiting
    replica.run()
    assert [len(helpers.tokens_of(replica.outputs["a"], index)) for index in range(3)] == [3, 3, 3]


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_moves_to_another_engine_goes_on_alike(
    make_replica: Any, fake_engine: Any, helpers: Any, kind: str, steps: int
) -> None:
    """Before its first token too: then in the middle of its prompt."""
    message = helpers.make_add("a", list(range(50, 40, -1)), **KINDS[kind])
    expected = expected_tokens(fake_engine, helpers, message)
    first, second = make_replica(max_num_seqs=1, max_num_batched_tokens=5), make_replica()
    first.engine.add(message)
    preempt(first, helpers, "a", steps + 1)
    generated = helpers.tokens_of(first.outputs.get("a", []))
    first.engine.forget("a")
    second.engine.add(Add(message.request, generated, replace(first.waiting["a", 0])))
    second.run()
    assert generated + helpers.tokens_of(second.outputs["a"]) == expected
    assert first.step().outputs == []
    assert (first.engine.num_preempted, first.engine.stats().kv_blocks_used) == (0, 0)
    assert second.engine.stats().recomputed_tokens_total == first.waiting["a", 0].num_served_tokens


@pytest.mark.parametrize("steps", [1, 4])
def test_a_guided_request_that_moves_keeps_to_its_guide(
    fake_engine: Any, helpers: Any, tokenizer_directory: Path, steps: int
) -> None:
    settings: dict[str, Any] = {"tokenizer": tokenizer_directory, "eos_token_ids": (2,)}
    guide = Guide(regex="[a-f]{3}(0|1)+[x-z]{2}")
    message = helpers.make_add("a", [4, 5, 6], guide=guide, temperature=0.0, max_tokens=16)
    alone = fake_engine(49152, **settings)
    alone.add(message)
    expected = helpers.tokens_of(helpers.run_until_idle(alone)["a"])
    first, second = (
        Replica(fake_engine(49152, max_num_seqs=1, has_common_queue=True, **settings)) for _ in range(2)
    )
    first.engine.add(message)
    while len(helpers.tokens_of(first.outputs.get("a", []))) < steps:
        first.step()
    preempt(first, helpers, "a", 0)
    first.engine.forget("a")
    generated = helpers.tokens_of(first.outputs["a"])
    second.engine.add(Add(message.request, generated, first.waiting["a", 0]))
    second.run()
    assert generated + helpers.tokens_of(second.outputs["a"]) == expected
    assert second.outputs["a"][-1].outcome is Outcome.STOP


def test_one_that_comes_back_to_where_it_was_is_not_mistaken_for_what_was_there(
    make_replica: Any, fake_engine: Any, helpers: Any
) -> None:
    message = helpers.make_add("a", [4, 5, 6], **GREEDY)
    replica = make_replica(max_num_seqs=1)
    replica.engine.add(message)
    preempt(replica, helpers, "a")
    view = replica.waiting.pop(("a", 0))
    generated = helpers.tokens_of(replica.outputs["a"])
    replica.engine.forget("a")
    replica.engine.add(Add(message.request, generated, view))
    output = replica.step()
    assert [(each.uid, each.outcome) for each in output.outputs] == [("a", None)]
    assert output.ended == []
    replica.run()
    assert helpers.tokens_of(replica.outputs["a"]) == expected_tokens(fake_engine, helpers, message)


def test_guides_are_compiled_while_all_others_wait_elsewhere(
    make_replica: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine sleeps until the compiler is done, in place of looking for it again and again."""
    replica = make_replica(max_num_seqs=1)
    replica.engine.add(helpers.make_add("a", [4, 5, 6], **GREEDY))
    preempt(replica, helpers, "a")
    waits: list[bool] = []

    def pop_compiled(has_time: bool) -> list[Any]:
        waits.append(has_time)
        return []

    monkeypatch.setattr(replica.engine._guide_queue, "pop_compiled", pop_compiled)
    replica.step()
    assert waits == [True]
