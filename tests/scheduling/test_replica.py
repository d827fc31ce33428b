from __future__ import annotations

from typing import Any

import pytest

from fastserve.scheduling.capacity import ReplicaCapacity
from fastserve.scheduling.policies.fcfs import FCFS
from fastserve.scheduling.policies.strict_priority import StrictPriority
from fastserve.scheduling.replica import LOST_AFTER_SECONDS, Demand, Replica

ONE = Demand(num_slots=1, num_blocks=2, num_tokens=8)


def a_capacity(**fields: Any) -> ReplicaCapacity:
    """Room for four sequences, ten blocks and 16 tokens, beside one that runs."""
    values: dict[str, Any] = {
        "incarnation": "a",
        "received": 0,
        "free_slots": 4,
        "free_blocks": 10,
        "free_tokens": 16,
        "num_running": 1,
        "num_blocks": 20,
    } | fields
    return ReplicaCapacity(**({"arrived": values["received"]} | values))


def a_replica(**fields: Any) -> Replica:
    replica = Replica()
    replica.update(a_capacity(**fields))
    return replica


def test_one_that_has_said_nothing_takes_nothing() -> None:
    replica = Replica()
    assert not replica.has_room(ONE)
    assert replica.victim(ONE, (0.0,), FCFS()) is None
    assert (replica.load, replica.oldest_release) == (0, None)


@pytest.mark.parametrize(
    ("fields", "has_room"),
    [
        ({}, True),
        ({"free_slots": 1, "free_blocks": 2, "free_tokens": 1}, True),
        ({"free_slots": 0}, False),
        ({"free_blocks": 1}, False),
        ({"free_tokens": 0}, False),
        ({"free_blocks": 0, "free_tokens": -5, "num_running": 0}, True),
        ({"free_slots": 0, "num_running": 0}, False),
    ],
)
def test_room_is_a_slot_blocks_and_a_token_of_the_next_step(fields: dict[str, int], has_room: bool) -> None:
    assert a_replica(**fields).has_room(ONE) is has_room


def test_what_is_on_its_way_takes_room_until_it_is_accounted_for() -> None:
    replica = a_replica(free_slots=2)
    replica.release(1.0, ONE, 0)
    replica.release(2.0, Demand(1, 3, 2), 0)
    assert (replica.has_room(ONE), replica.load, replica.oldest_release) == (False, 3, 1.0)
    replica.update(a_capacity(free_slots=2, received=1))
    assert (replica.has_room(ONE), replica.load, replica.oldest_release) == (True, 2, 2.0)
    assert not replica.has_room(Demand(1, 8, 1)), "three of ten blocks are taken"
    replica.update(a_capacity(free_slots=2, received=2, free_blocks=8))
    assert replica.has_room(Demand(2, 8, 1))


def test_an_empty_replica_has_room_for_one_at_a_time() -> None:
    replica = a_replica(num_running=0, free_blocks=1)
    assert replica.has_room(ONE)
    replica.release(0.0, ONE, 0)
    assert not replica.has_room(ONE)


def test_a_new_worker_has_no_prefixes_and_slots_of_its_own() -> None:
    replica = a_replica(free_slots=8)
    replica.prefixes.insert([b"x"])
    assert replica.clip(Demand(9, 1, 1)).num_slots == 8
    replica.update(a_capacity(free_slots=2, received=1))
    assert (replica.clip(Demand(9, 1, 1)).num_slots, replica.prefixes.match([b"x"])) == (8, 1)
    replica.update(a_capacity(free_slots=2, received=1, incarnation="b"))
    assert (replica.clip(Demand(9, 1, 1)).num_slots, replica.prefixes.match([b"x"])) == (2, 0)


def test_what_never_came_is_given_up_but_not_what_waits_for_a_long_step() -> None:
    replica = a_replica(free_slots=1)
    replica.release(0.0, ONE, 0)
    replica.drop_lost(LOST_AFTER_SECONDS - 0.01)
    assert replica.oldest_release == 0.0
    replica.update(a_capacity(free_slots=1, arrived=1))
    replica.drop_lost(1e6)
    assert replica.oldest_release == 0.0
    replica.release(1.0, ONE, 0)
    replica.drop_lost(1.0 + LOST_AFTER_SECONDS)
    assert replica.load == 2, "one has arrived, the other is lost"
    replica.update(a_capacity(free_slots=0, received=1, num_running=2))
    assert (replica.load, replica.oldest_release) == (2, None)


# --- whom a newcomer would preempt


def test_the_last_by_rank_makes_way_where_the_policy_allows_it() -> None:
    replica = a_replica(free_slots=0, running_blocks=[2, 2], running_ranks=[(3.0,), (1.0,)])
    assert replica.victim(ONE, (2.0,), FCFS()) == ((3.0,), 1)
    assert replica.victim(ONE, (3.0,), FCFS()) is None
    assert replica.victim(ONE, (0.0,), StrictPriority()) is None


def test_several_slots_are_taken_from_several() -> None:
    replica = a_replica(free_slots=1, running_ranks=[(3.0,), (2.0,), (1.0,)])
    assert replica.victim(Demand(3, 2, 1), (1.5,), FCFS()) == ((2.0,), 2)
    assert replica.victim(Demand(4, 2, 1), (1.5,), FCFS()) is None
    assert replica.victim(Demand(5, 2, 1), (0.0,), FCFS()) is None, "no more than three are known"


def test_a_victim_is_taken_once() -> None:
    replica = a_replica(free_slots=0, running_blocks=[2, 2], running_ranks=[(3.0,), (2.0,)])
    replica.release(0.0, ONE, 1)
    assert replica.victim(ONE, (1.0,), FCFS()) == ((2.0,), 1)
    replica.release(0.0, ONE, 1)
    assert replica.victim(ONE, (1.0,), FCFS()) is None
    replica.update(a_capacity(free_slots=0, received=2, running_ranks=[(1.0,), (1.0,)]))
    assert replica.victim(ONE, (0.5,), FCFS()) == ((1.0,), 1)


@pytest.mark.parametrize(
    ("num_blocks", "num_preempted"), [(4, 1), (7, 1), (8, 2), (12, 3), (13, None), (100, None)]
)
def test_as_many_make_way_as_leave_the_blocks(num_blocks: int, num_preempted: int | None) -> None:
    """Four blocks are free; those that run would leave 3, 4 and 1."""
    ranks, blocks = [(3.0,), (2.0,), (1.0,)], [3, 4, 1]
    replica = a_replica(free_blocks=4, num_running=3, running_ranks=ranks, running_blocks=blocks)
    found = replica.victim(Demand(1, num_blocks, 1), (0.0,), FCFS())
    assert found == (None if num_preempted is None else (ranks[num_preempted - 1], num_preempted))


def test_blocks_of_those_that_may_not_be_preempted_are_not_counted_on() -> None:
    replica = a_replica(free_blocks=0, num_running=2, running_ranks=[(3.0,), (1.0,)], running_blocks=[2, 8])
    assert replica.victim(Demand(1, 2, 1), (2.0,), FCFS()) == ((3.0,), 1)
    assert replica.victim(Demand(1, 3, 1), (2.0,), FCFS()) is None


def test_blocks_that_others_on_the_way_take_are_theirs() -> None:
    ranks = [(3.0,), (2.0,), (1.0,)]
    replica = a_replica(free_blocks=1, num_running=3, running_ranks=ranks, running_blocks=[4, 4, 4])
    replica.release(0.0, Demand(1, 5, 1), 1)
    assert replica.victim(Demand(1, 4, 1), (0.0,), FCFS()) == ((2.0,), 1)
    assert replica.victim(Demand(1, 5, 1), (0.0,), FCFS()) == ((1.0,), 2)
    assert replica.victim(Demand(1, 9, 1), (0.0,), FCFS()) is None


def test_where_more_run_than_are_known_the_replica_is_asked() -> None:
    replica = a_replica(free_blocks=0, num_running=9, running_ranks=[(3.0,), (2.0,)], running_blocks=[1, 1])
    assert replica.victim(Demand(1, 20, 1), (1.0,), FCFS()) == ((2.0,), 2)
    assert replica.victim(Demand(1, 20, 1), (2.5,), FCFS()) is None
