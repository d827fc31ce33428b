"""What is counted from token to token is what the whole sequence says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastserve.engine.penalties import TokenCounts
from fastserve.engine.sampler import Sampler
from fastserve.scheduling.sequence import Sequence
from fastserve.types import view_of

tokens = st.integers(0, 6)
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "temperature": 0.0,
    "max_tokens": 40,
}


@given(prompt=st.lists(tokens, min_size=1), generated=st.lists(tokens))
def test_counts_of_tokens(prompt: list[int], generated: list[int]) -> None:
    counts = TokenCounts(prompt)
    for token in generated:
        counts.add(token)
    assert sorted(counts.ids.tolist()) == sorted({*prompt, *generated})
    expected = Counter(generated)
    assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == {
        token: expected[token] for token in {*prompt, *generated}
    }


def test_counts_of_many_distinct_tokens() -> None:
    counts = TokenCounts([5])
    for token in range(1000):
        counts.add(token)
    assert np.array_equal(np.sort(counts.ids), np.arange(1000))
    assert counts.counts.tolist() == [1] * 1000


def expected_penalized(logits: torch.Tensor, prompt: list[int], generated: list[int]) -> torch.Tensor:
    logits = logits.clone()
    for token in {*prompt, *generated}:
        logits[token] *= 1.3 if logits[token] <= 0 else 1 / 1.3
    for token, count in Counter(generated).items():
        logits[token] -= 0.5 + 0.25 * count
    return logits


def test_penalties_are_those_of_the_whole_sequence(helpers: Any) -> None:
    request = helpers.make_request("a", [3, 3, 9], **PENALTIES)
    sequence = Sequence(request, 0, view_of(request), [3, 3, 9])
    sampler = Sampler([], 20)
    state = sampler.start(sequence, None)
    for _ in range(40):
        logits = torch.randn(1, 20) * 3
        expected = expected_penalized(logits[0], sequence.token_ids[:3], sequence.token_ids[3:])
        (token,) = sampler.sample(logits, [state])
        torch.testing.assert_close(logits[0], expected)
        assert token.token_id == expected.argmax()
        sequence.token_ids.append(token.token_id)
        assert state.append(token.token_id) is None


def test_penalties_survive_preemption(fake_engine: Any, helpers: Any) -> None:
    texts = []
    for num_blocks in (200, 24):
        engine = fake_engine(num_blocks=num_blocks)
        for uid in "abcd":
            engine.add(helpers.make_add(uid, [ord(uid) % 7, 5], bad_words=[[1], [2, 3], [2, 4]], **PENALTIES))
        outputs = helpers.run_until_idle(engine)
        texts.append({uid: helpers.tokens_of(outputs[uid]) for uid in outputs})
    assert engine.stats().preemptions_total > 0
    assert texts[0] == texts[1]


def test_a_step_that_is_repeated_books_its_token_once(fake_engine: Any, helpers: Any) -> None:
    texts = []
    for poison in (set(), {59}):
        engine = fake_engine()
        engine.runner.poison = poison
        engine.add(helpers.make_add("a", [1, 2], logit_bias={59: -100.0}, **PENALTIES))
        for number in range(4):
            engine.step()
            engine.add(helpers.make_add(f"bad {number}", [59], temperature=0.0))
        texts.append(helpers.tokens_of(helpers.run_until_idle(engine)["a"]))
    assert texts[0] == texts[1]
