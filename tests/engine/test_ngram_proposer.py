"""What is proposed is what followed the longest and latest match, by a search of the whole sequence."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastserve.engine.ngram_proposer import MAX_NGRAM, MIN_NGRAM, NgramProposer

tokens = st.lists(st.integers(0, 3), max_size=40)


def expected(token_ids: list[int], count: int) -> list[int]:
    """By a search from the end; a match that reaches the end goes on in what it proposes."""
    length = len(token_ids)
    for n in range(MAX_NGRAM, MIN_NGRAM - 1, -1):
        for follower in range(length - 1, n - 1, -1):
            if length >= n and token_ids[follower - n : follower] == token_ids[length - n :]:
                text = list(token_ids)
                for i in range(count):
                    text.append(text[follower + i])
                return text[length:]
    return []


@given(st.lists(tokens, max_size=8), st.integers(1, 10))
def test_the_tokens_behind_the_longest_and_latest_match(pieces: list[list[int]], count: int) -> None:
    token_ids: list[int] = []
    proposer = NgramProposer(token_ids)
    for piece in pieces:
        token_ids += piece
        assert proposer.propose(count) == expected(token_ids, count)


def test_a_passage_that_is_quoted() -> None:
    token_ids = [*range(100), 7, 8, 9]
    proposer = NgramProposer(token_ids)
    assert proposer.propose(5) == [10, 11, 12, 13, 14]
    token_ids += [10, 11, 3, 4]
    assert proposer.propose(3) == [5, 6, 7]
    token_ids.append(50)
    assert proposer.propose(3) == []


def test_an_index_of_a_long_prompt_looks_at_each_token_once() -> None:
    """Ten thousand proposals of a sequence of ten thousand tokens: a search for each would take minutes."""
    token_ids = list(range(10_000))
    proposer = NgramProposer(token_ids)
    for token in range(5_000, 15_000):
        token_ids.append(token)
        proposer.propose(4)
    assert all(len(followers) <= len(token_ids) for followers in proposer._followers.values())
    token_ids += [0, 1]
    assert proposer.propose(2) == [2, 3]
