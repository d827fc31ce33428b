from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.scheduling.conftest import QUICK

from fastserve.scheduling.host_cache import HostCache

A, B, C = b"a", b"b", b"c"


def test_nothing_is_kept_without_blocks() -> None:
    host = HostCache(0)
    host.put(A, 7)
    assert (A in host, host.hold(A), host.copies_out, host.num_used) == (False, None, [], 0)


def test_the_least_recently_used_leaves_first() -> None:
    host = HostCache(2)
    host.put(A, 0)
    host.put(B, 1)
    host.begin_step()
    host.put(A, 5)
    assert host.copies_out == [], "it is here already"
    host.put(C, 6)
    assert (A in host, B in host, C in host, host.num_used) == (True, False, True, 2)
    assert [block for block, _ in host.copies_out] == [6]


def test_what_is_held_stays_until_the_next_step() -> None:
    host = HostCache(1)
    host.put(A, 0)
    host.begin_step()
    here = host.hold(A)
    assert here is not None
    host.copy_in(here, 4)
    host.put(B, 1)
    assert (A in host, B in host) == (True, False)
    assert (host.copies_in, host.copies_out) == ([(here, 4)], [])
    host.begin_step()
    host.put(B, 1)
    assert (A in host, B in host, host.copies_in) == (False, True, [])


def test_of_two_copies_to_one_block_the_last_is_made() -> None:
    host = HostCache(2)
    host.put(A, 0)
    host.put(B, 1)
    host.begin_step()
    for digest in (A, B):
        here = host.hold(digest)
        assert here is not None
        host.copy_in(here, 9)
    assert host.copies_in == [(here, 9)]
    host.begin_step()
    host.put(C, 3)
    host.put(b"d", 4)
    host.put(b"e", 5)
    assert len({here for _, here in host.copies_out}) == len(host.copies_out) == 2


class HostMachine(RuleBasedStateMachine):
    """Blocks of a pool change their content; what comes back is what was put, whatever happened meanwhile."""

    @initialize(num_blocks=st.integers(0, 4))
    def start(self, num_blocks: int) -> None:
        self.host = HostCache(num_blocks)
        self.memory: dict[int, bytes] = {}
        self.pool: dict[int, bytes] = {}

    @rule(
        puts=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), max_size=6),
        wanted=st.lists(st.tuples(st.integers(0, 6), st.integers(6, 9)), max_size=4),
        put_first=st.booleans(),
    )
    def step(self, puts: list[tuple[int, int]], wanted: list[tuple[int, int]], put_first: bool) -> None:
        """Block b of the pool holds what it is put under; blocks 6 to 9 are filled from the host."""
        self.host.begin_step()
        calls = [("put", *each) for each in puts]
        gets = [("get", *each) for each in wanted]
        expected: dict[int, bytes] = {}
        for kind, number, block in calls + gets if put_first else gets + calls:
            digest = bytes([number])
            if kind == "put":
                if self.pool.setdefault(block, digest) == digest:
                    self.host.put(digest, block)
            elif (here := self.host.hold(digest)) is not None:
                self.host.copy_in(here, block)
                expected[block] = digest
        for block, here in self.host.copies_out:
            self.memory[here] = self.pool[block]
        for here, block in self.host.copies_in:
            assert self.memory[here] == expected.pop(block)
        assert not expected
        self.pool.clear()

    @invariant()
    def holds_what_it_says(self) -> None:
        if hasattr(self, "host"):
            assert self.host.num_used <= self.host.num_blocks
            for digest, here in self.host._blocks.items():
                assert self.memory[here] == digest
            places = [*self.host._blocks.values(), *self.host._free]
            assert sorted(places) == list(range(self.host.num_blocks))


TestHostMachine = HostMachine.TestCase
TestHostMachine.settings = QUICK
