from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests.scheduling.conftest import a_request, sequences_of

from fastserve.scheduling.block_pool import BlockPool, root_hash
from fastserve.scheduling.prefix_index import PrefixIndex, block_hashes

prompts = st.lists(st.integers(0, 1), min_size=1, max_size=12)


@given(prompts, st.integers(1, 5))
def test_the_hashes_are_those_of_the_engine(prompt: list[int], block_size: int) -> None:
    [sequence] = sequences_of(a_request("r", prompt))
    sequence.hash_full_blocks(block_size)
    assert block_hashes(prompt, block_size) == sequence.block_hashes


@given(prompts, st.integers(1, 3))
def test_requests_of_another_salt_find_nothing(prompt: list[int], block_size: int) -> None:
    found = {}
    for salt in ("", "a", "b"):
        [sequence] = sequences_of(a_request("r", prompt, cache_salt=salt))
        sequence.hash_full_blocks(block_size)
        found[salt] = set(sequence.block_hashes)
        assert block_hashes(prompt, block_size, root_hash(salt)) == sequence.block_hashes
    assert not found[""] & found["a"] | found["a"] & found["b"] | found[""] & found["b"]


@given(st.lists(prompts, max_size=8), prompts)
def test_with_room_for_all_it_knows_what_a_cache_knows(sent: list[list[int]], prompt: list[int]) -> None:
    index, pool = PrefixIndex(100), BlockPool(100, 2, True)
    for each in sent:
        hashes = block_hashes(each, 2)
        index.insert(hashes)
        table = pool.match_prefix(hashes)
        table += pool.allocate(len(hashes) - len(table))
        for block, digest in zip(table, hashes, strict=True):
            pool.cache(block, digest)
    hashes = block_hashes(prompt, 2)
    assert index.match(hashes) == len(pool.match_prefix(hashes))


def test_a_tail_is_forgotten_before_its_head_and_the_least_recently_sent_first() -> None:
    index = PrefixIndex(3)
    old, new = [b"a", b"b", b"c"], [b"d", b"e"]
    index.insert(old)
    index.insert(new)
    assert (index.match(old), index.match(new)) == (1, 2)
    index.insert(old[:1])
    index.insert([b"f"])
    assert (index.match(old), index.match(new), index.match([b"f"])) == (1, 1, 1)


def test_of_a_replica_without_blocks_nothing_is_known() -> None:
    index = PrefixIndex(0)
    index.insert([b"a"])
    assert index.match([b"a"]) == 0
