"""With speculation the tokens are those that come without, whatever a request asks for and whoever runs
beside it. Over a fake model of few tokens, so that guesses are right and wrong by turns."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fastserve.types import Add, Outcome

VOCAB = 6
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 3},
    {"temperature": 1.0, "seed": 3, "n": 3},
    {"temperature": 0.0, "repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.2},
    {"temperature": 0.5, "seed": 1, "bad_words": [[0, 1], [2, 3, 4], [5]]},
    {"temperature": 0.0, "min_tokens": 9, "stop_token_ids": [3, 4]},
    {"temperature": 0.0, "stop_token_ids": [5]},
    {"temperature": 1.0, "logit_bias": {0: 2.0, 1: 1.0}},
    {"temperature": 0.8, "logprobs": 2, "prompt_logprobs": 1},
]


@pytest.fixture
def speculating_engine(fake_engine: Any, helpers: Any) -> Any:
    def make(**settings: Any) -> Any:
        return helpers.always_speculate(fake_engine(VOCAB, num_speculative_tokens=5, **settings))

    return make


requests = st.lists(
    st.tuples(
        st.integers(1, 30),  # tokens of the prompt
        st.integers(1, 30),  # tokens of the answer
        st.integers(0, len(KINDS) - 1),
        st.integers(-2, 2),  # priority
        st.integers(0, 6),  # steps after the one before
    ),
    min_size=1,
    max_size=8,
)


def all_of(outputs: list[Any], index: int) -> tuple[list[int], list[Any], Any]:
    """Tokens, log-probabilities and the end of a sequence."""
    own = [each for each in outputs if each.index == index]
    logprobs = [entry for each in own for entry in each.logprobs]
    return [token for each in own for token in each.token_ids], logprobs, own[-1].outcome


@pytest.mark.parametrize(("prefix_caching", "num_host_blocks"), [(True, 0), (False, 40)])
def test_tokens_are_those_that_come_without(
    fake_engine: Any, speculating_engine: Any, helpers: Any, prefix_caching: bool, num_host_blocks: int
) -> None:
    accepted = preempted = 0

    @settings(max_examples=20, phases=[Phase.explicit, Phase.generate], database=None, deadline=None)
    @given(requests, st.integers(0, 2**32))
    def check(shapes: list[tuple[int, int, int, int, int]], seed: int) -> None:
        nonlocal accepted, preempted
        numbers = random.Random(seed)
        engine = speculating_engine(
            num_blocks=16, prefix_caching=prefix_caching, num_host_blocks=num_host_blocks, max_num_seqs=4
        )
        plain = fake_engine(VOCAB, prefix_caching=False)
        outputs: dict[str, list[Any]] = {}

        def step() -> None:
            for output in engine.step().outputs:
                outputs.setdefault(output.uid, []).append(output)
            engine.scheduler.check()

        messages: list[Add] = []
        for number, (num_prompt, num_output, kind, priority, pause) in enumerate(shapes):
            prompt = [numbers.randrange(3) for _ in range(num_prompt)]
            sampling = {"max_tokens": num_output, **KINDS[kind]}
            messages.append(helpers.make_add(f"{number}", prompt, priority, **sampling))
            engine.add(messages[-1])
            for _ in range(pause):
                step()
        while engine.has_work:
            step()
        for message in messages:
            request = message.request
            plain.add(message)
            expected = helpers.run_until_idle(plain)[request.uid]
            for index in range(request.sampling.n):
                assert all_of(outputs[request.uid], index) == all_of(expected, index)
        stats = engine.stats()
        assert stats.kv_blocks_used == 0
        assert not engine._speculator._drafts
        accepted += stats.accepted_tokens_total
        preempted += stats.preemptions_total

    check()
    assert accepted > 40
    assert preempted > 0


ONES: dict[str, Any] = {"temperature": 0.0, "logit_bias": {1: 100.0}, "max_tokens": 31}
"""An answer of the token 1 alone."""


def test_steps_are_saved_and_counted(speculating_engine: Any, helpers: Any) -> None:
    engine = speculating_engine()
    engine.add(helpers.make_add("a", [1, 1, 1], **ONES))
    steps = [engine.step() for _ in range(6)]
    assert [len(each.outputs) for each in steps] == [1, 6, 6, 6, 6, 6]
    assert [each.stats.step_tokens for each in steps] == [3, 6, 6, 6, 6, 6]
    assert steps[-1].outputs[-1].outcome is Outcome.LENGTH
    stats = steps[-1].stats
    assert (stats.draft_tokens_total, stats.accepted_tokens_total) == (25, 25)


def test_what_follows_a_stop_token_is_dropped(speculating_engine: Any, helpers: Any) -> None:
    engine = speculating_engine()
    sampling = {**ONES, "min_tokens": 9, "stop_token_ids": [1]}
    sampling["logit_bias"] = {1: 100.0, 2: 50.0}  # 2 while 1 may not come
    engine.add(helpers.make_add("a", [2, 2, 2], **sampling))
    outputs = helpers.run_until_idle(engine)["a"]
    assert helpers.tokens_of(outputs) == [2] * 9 + [1]
    assert [each.outcome for each in outputs[-2:]] == [None, Outcome.STOP]
    engine.add(helpers.make_add("b", [1, 1, 1], **{**ONES, "stop_token_ids": [1], "min_tokens": 0}))
    assert helpers.tokens_of(helpers.run_until_idle(engine)["b"]) == [1]
    assert engine.stats().accepted_tokens_total > 0


def test_numbers_behind_a_guess_that_are_not_finite_cost_the_guess_alone(
    speculating_engine: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = speculating_engine()
    run = engine.runner.run

    def run_with_nan(plan: Any) -> torch.Tensor:
        hidden: torch.Tensor = run(plan)
        if plan.scheduled[0].proposed:
            hidden[3:] = torch.nan  # behind the third guess
        return hidden

    monkeypatch.setattr(engine.runner, "run", run_with_nan)
    engine.add(helpers.make_add("a", [1, 1, 1], **ONES))
    outputs = helpers.run_until_idle(engine)["a"]
    assert helpers.tokens_of(outputs) == [1] * 31
    assert engine.stats().accepted_tokens_total == 20  # two of each five


def test_a_guess_takes_no_block_that_a_running_sequence_needs(speculating_engine: Any, helpers: Any) -> None:
    """The cache is just large enough: with a block for guesses one of them would be preempted."""
    engine = speculating_engine(num_blocks=18, block_size=4)
    for uid in ("a", "b"):
        engine.add(helpers.make_add(uid, [1, 1, 1, 1, 1], **ONES))
    outputs = helpers.run_until_idle(engine)
    assert helpers.tokens_of(outputs["a"]) == helpers.tokens_of(outputs["b"]) == [1] * 31
    assert engine.stats().preemptions_total == 0
    assert engine.stats().accepted_tokens_total > 0


def test_a_cancelled_one_leaves_nothing(speculating_engine: Any, helpers: Any) -> None:
    engine = speculating_engine()
    engine.add(helpers.make_add("a", [1, 1, 1], **ONES))
    engine.step()
    engine.step()
    engine.cancel("a", Outcome.CANCELLED)
    helpers.run_until_idle(engine)
    assert engine.stats().kv_blocks_used == 0
    assert not engine._speculator._drafts


def test_a_row_that_cannot_be_sampled_behind_a_guess_fails_its_request(
    speculating_engine: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = speculating_engine()
    sample = engine._sampler.sample

    def sample_few(logits: torch.Tensor, states: list[Any]) -> Any:
        if any(
            each.sequence.request.uid == "bad" and each.sequence.num_generated_tokens == 4 for each in states
        ):
            raise ValueError("no such row")
        return sample(logits, states)

    monkeypatch.setattr(engine._sampler, "sample", sample_few)
    for uid in ("good", "bad", "other"):
        engine.add(helpers.make_add(uid, [1, 1, 1], **ONES))
    outputs = helpers.run_until_idle(engine)
    assert helpers.tokens_of(outputs["good"]) == helpers.tokens_of(outputs["other"]) == [1] * 31
    assert helpers.tokens_of(outputs["bad"]) == [1] * 4
    assert outputs["bad"][-1].outcome is Outcome.ERROR
    assert "ValueError" in outputs["bad"][-1].failure.message
