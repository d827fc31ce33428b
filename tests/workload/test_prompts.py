"""Token ids for prompts of which only the length is known."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastserve.workload.arrival import Arrival
from fastserve.workload.prompts import TOKEN_IDS, prompt_token_ids

BLOCK = 8
HASHES = st.lists(st.integers(0, 4), min_size=1, max_size=5)


def arrival_of(hashes: list[int], num_in_last: int) -> Arrival:
    length = (len(hashes) - 1) * BLOCK + num_in_last
    return Arrival(0.0, length, 1, block_hashes=tuple(hashes), block_size=BLOCK)


@given(HASHES, HASHES, st.integers(1, BLOCK), st.integers(1, BLOCK), st.integers(0, 3))
def test_prompts_share_what_their_hashes_share_and_no_more(
    first: list[int], second: list[int], first_rest: int, second_rest: int, seed: int
) -> None:
    a = prompt_token_ids(arrival_of(first, first_rest), 0, seed)
    b = prompt_token_ids(arrival_of(second, second_rest), 1, seed)
    common = next((i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), None)
    length = min(len(a), len(b)) if common is None else common * BLOCK
    assert a[:length] == b[:length]
    if common is not None:
        end = length + min(BLOCK, len(a) - length, len(b) - length)
        assert end - length < 3 or a[length:end] != b[length:end]


def test_prompts_without_hashes_share_nothing_and_are_the_same_each_time() -> None:
    arrival = Arrival(0.0, 100, 1)
    first, second = (prompt_token_ids(arrival, number, seed=0) for number in (0, 1))
    assert len(first) == 100
    assert sum(x == y for x, y in zip(first, second, strict=True)) < 5
    assert prompt_token_ids(arrival, 0, seed=0) == first
    assert prompt_token_ids(arrival, 0, seed=1) != first
    assert prompt_token_ids(Arrival(0.0, 100, 1, block_hashes=(0,), block_size=100), 0, seed=0) != first


def test_tokens_are_ordinary_ones() -> None:
    assert set(prompt_token_ids(Arrival(0.0, 10_000, 1), 0, seed=0)) <= set(TOKEN_IDS)
