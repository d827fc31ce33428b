from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fastserve.scheduling.block_pool import (
    ROOT_HASH,
    BlockPool,
    BlockPoolError,
    OutOfBlocksError,
    hash_block,
    private_root_hash,
)

A, B, C = (hash_block(ROOT_HASH, [token]) for token in range(3))


def cached(pool: BlockPool, *digests: bytes) -> list[int]:
    table = pool.allocate(len(digests))
    for block, digest in zip(table, digests, strict=True):
        pool.cache(block, digest)
    return table


def test_a_hash_depends_on_the_tokens_and_on_all_before_them() -> None:
    assert len(A) == 16
    assert hash_block(A, [1, 2]) == hash_block(A, [1, 2])
    assert len({hash_block(parent, ids) for parent in (A, B) for ids in ([1, 2], [2, 1], [1, 258])}) == 6


def test_more_than_is_free_is_refused_whole() -> None:
    pool = BlockPool(3, 4, True)
    pool.allocate(2)
    with pytest.raises(OutOfBlocksError, match="2 KV blocks were asked for; 1 are free"):
        pool.allocate(2)
    assert (pool.num_free, pool.num_used) == (1, 2)


def test_a_released_block_is_found_again_and_counts_as_free_meanwhile() -> None:
    pool = BlockPool(4, 4, True)
    table = cached(pool, A, B)
    pool.free(table)
    assert pool.num_free == 4
    assert pool.match_prefix([A, B, C]) == table
    assert pool.num_free == 2
    pool.check([table])


def test_a_shared_block_is_free_when_the_last_holder_lets_go() -> None:
    pool = BlockPool(2, 4, True)
    table = cached(pool, A)
    assert pool.match_prefix([A]) == table
    assert pool.ref_count(table[0]) == 2
    pool.free(table)
    assert pool.num_used == 1
    pool.free(table)
    assert pool.num_used == 0


def test_a_match_ends_at_the_first_gap() -> None:
    pool = BlockPool(4, 4, True)
    first, _ = cached(pool, A, C)
    assert pool.match_prefix([A, B, C]) == [first]
    assert pool.match_prefix([B, A]) == []


def test_blocks_that_are_not_cached_go_before_those_that_are_and_a_tail_before_its_head() -> None:
    pool = BlockPool(4, 4, True)
    table = cached(pool, A, B, C)
    pool.free(table)
    assert pool.allocate(1)[0] not in table
    assert pool.allocate(1) == [table[2]]
    assert pool.allocate(1) == [table[1]]
    assert pool.match_prefix([A, B, C]) == [table[0]]


def test_the_least_recently_held_is_evicted_first() -> None:
    pool = BlockPool(2, 4, True)
    [a], [b] = cached(pool, A), cached(pool, B)
    pool.free([a])
    pool.free([b])
    pool.free(pool.match_prefix([A]))
    assert pool.allocate(1) == [b]


def test_the_first_of_two_equal_blocks_stays_the_one_that_is_found() -> None:
    pool = BlockPool(2, 4, True)
    [first], [second] = cached(pool, A), cached(pool, A)
    pool.free([second])
    assert pool.match_prefix([A]) == [first]
    pool.check([[first], [first]])


def test_sequences_that_share_with_nobody_have_roots_of_their_own() -> None:
    roots = {private_root_hash(uid, index) for uid in ("a", "b", "1 a") for index in (0, 1)}
    assert len(roots | {ROOT_HASH}) == 7
    assert private_root_hash("a", 0) == private_root_hash("a", 0)


def test_a_block_that_is_taken_can_be_written_to() -> None:
    pool = BlockPool(2, 4, True)
    [block] = cached(pool, A)
    assert pool.take(A) is None, "somebody uses it"
    pool.free([block])
    assert pool.take(A) == block
    assert (pool.ref_count(block), pool.num_free, pool.match_prefix([A]), pool.take(A)) == (1, 1, [], None)
    pool.check([[block]])


def test_of_preempted_sequences_what_is_evicted_goes_to_the_host_and_comes_back() -> None:
    pool = BlockPool(1, 4, True, num_host_blocks=1)
    pool.free(cached(pool, A), retain=True)
    [block] = pool.allocate(1)
    [(_, here)] = pool.host.copies_out
    assert pool.fetch(B) is None
    with pytest.raises(OutOfBlocksError):
        pool.fetch(A)
    pool.free([block])
    pool.host.begin_step()
    assert pool.fetch(A) == block
    assert pool.host.copies_in == [(here, block)]
    pool.check([[block]])


def test_blocks_of_preempted_sequences_are_evicted_last_and_alone_go_to_the_host() -> None:
    pool = BlockPool(2, 4, True, num_host_blocks=2)
    [preempted], [ended] = cached(pool, A), cached(pool, B)
    pool.free([preempted], retain=True)
    pool.free([ended])
    assert pool.num_unretained == 1
    assert pool.allocate(1) == [ended]
    assert B not in pool.host
    assert pool.allocate(1) == [preempted]
    assert A in pool.host
    pool.check([[preempted, ended]])


def test_room_for_what_comes_back_does_not_push_it_out() -> None:
    pool = BlockPool(1, 4, True, num_host_blocks=1)
    pool.free(cached(pool, A), retain=True)
    pool.free(cached(pool, B), retain=True)
    assert A in pool.host
    pool.host.begin_step()
    assert pool.fetch(A) == 0
    assert (len(pool.host.copies_in), pool.host.copies_out) == (1, [])


def test_blocks_of_preempted_sequences_are_evicted_last_and_the_others_for_good() -> None:
    pool = BlockPool(2, 4, True, num_host_blocks=2)
    [a], [b] = cached(pool, A), cached(pool, B)
    pool.free([a], retain=True)
    pool.free([b])
    assert (pool.num_free, pool.num_unretained) == (2, 1)
    assert pool.allocate(1) == [b]
    assert pool.host.num_used == 0
    assert pool.allocate(1) == [a]
    assert A in pool.host


def test_a_double_free_is_noticed() -> None:
    pool = BlockPool(2, 4, True)
    table = pool.allocate(1)
    pool.free(table)
    with pytest.raises(BlockPoolError, match="is free already"):
        pool.free(table)


def test_check_notices_a_leak_and_a_wrong_table() -> None:
    pool = BlockPool(2, 4, True)
    table = pool.allocate(1)
    pool.check([table])
    with pytest.raises(BlockPoolError, match="reference counts"):
        pool.check([])
    with pytest.raises(BlockPoolError, match="reference counts"):
        pool.check([table, table])


class PoolMachine(RuleBasedStateMachine):
    """Sequences that take and give up blocks; each block's true content is kept beside the pool."""

    @initialize(num_blocks=st.integers(1, 8), caching=st.booleans())
    def start(self, num_blocks: int, caching: bool) -> None:
        self.pool = BlockPool(num_blocks, 1, caching)
        self.contents: dict[int, tuple[int, ...]] = {}
        self.used: list[tuple[tuple[int, ...], list[int]]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5), is_cached=st.booleans())
    def take(self, tokens: list[int], is_cached: bool) -> None:
        hashes: list[bytes] = []
        for token in tokens:
            hashes.append(hash_block(hashes[-1] if hashes else ROOT_HASH, [token]))
        table = self.pool.match_prefix(hashes)
        for index, block in enumerate(table):
            assert self.contents[block] == tuple(tokens[: index + 1])
        missing = len(tokens) - len(table)
        if missing > self.pool.num_free:
            with pytest.raises(OutOfBlocksError):
                self.pool.allocate(missing)
            self.pool.free(table)
            return
        fresh = self.pool.allocate(missing)
        assert not {block for _, other in self.used for block in other} & set(fresh)
        table += fresh
        for index, block in enumerate(table):
            self.contents[block] = tuple(tokens[: index + 1])
            if is_cached:
                self.pool.cache(block, hashes[index])
        self.used.append((tuple(tokens), table))

    @rule(data=st.data(), retain=st.booleans())
    def release(self, data: st.DataObject, retain: bool) -> None:
        if self.used:
            _, table = self.used.pop(data.draw(st.integers(0, len(self.used) - 1)))
            self.pool.free(table, retain)

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "pool"):
            return
        tables = [table for _, table in self.used]
        self.pool.check(tables)
        assert self.pool.num_used == len({block for table in tables for block in table})
        for tokens, table in self.used:
            assert [self.contents[block] for block in table] == [
                tokens[: index + 1] for index in range(len(tokens))
            ]


TestPoolMachine = PoolMachine.TestCase
