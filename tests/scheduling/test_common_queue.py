"""The common queue and the batches of its replicas together: what holds of both, with messages under way."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.scheduling.cluster import Cluster
from tests.scheduling.conftest import POLICIES, a_request

from fastserve.scheduling.policies.fair import OUTPUT_TOKEN_COST, PROMPT_TOKEN_COST, Fair
from fastserve.scheduling.policies.priority_age import PriorityAge
from fastserve.types import Request

CONSTANT = ("priority_age", "fcfs", "srpt", "strict_priority")
"""Policies under which what waits keeps its rank."""


def random_request(cluster: Cluster, rng: random.Random, max_length: int = 40, max_n: int = 3) -> Request:
    return a_request(
        str(len(cluster.requests)),
        [rng.randrange(3) for _ in range(rng.randint(1, max_length))],
        priority=rng.choice([0, 0, 0, 1, 2]),
        tenant=rng.choice("abc"),
        arrival=cluster.now,
        max_tokens=rng.randint(1, max_length),
        n=rng.choice([1, 1, 1, *range(1, max_n + 1)]),
    )


def drain(cluster: Cluster) -> None:
    """Steps until all has ended: a step computes something, but for those in which messages are under way."""
    needed = sum(
        request.sampling.n * (len(request.prompt_token_ids) + request.sampling.max_tokens)
        for request in cluster.requests.values()
    )
    limit = cluster.num_steps + 4 * needed + 10
    while not cluster.is_idle:
        cluster.step()
        assert cluster.num_steps < limit, "something is stuck, or goes to and fro"


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(POLICIES)),
    num_replicas=st.integers(1, 3),
    num_blocks=st.integers(20, 80),
    max_num_seqs=st.integers(1, 5),
    num_host_blocks=st.sampled_from([0, 5, 500]),
    prefix_caching=st.booleans(),
    num_requests=st.integers(1, 25),
    pause=st.integers(0, 8),
    seed=st.integers(0, 2**32),
)
def test_every_request_ends_and_nothing_is_left(
    name: str,
    num_replicas: int,
    num_blocks: int,
    max_num_seqs: int,
    num_host_blocks: int,
    prefix_caching: bool,
    num_requests: int,
    pause: int,
    seed: int,
) -> None:
    rng = random.Random(seed)
    cluster = Cluster(
        POLICIES[name],
        num_replicas,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        num_host_blocks=num_host_blocks,
        prefix_caching=prefix_caching,
    )
    for _ in range(num_requests):
        cluster.submit(random_request(cluster, rng))
        for _ in range(rng.randint(0, pause)):
            cluster.step()
    drain(cluster)
    assert (cluster.queue.num_waiting, cluster.away, cluster.policy.waiting) == (0, {}, {})
    for worker in cluster.workers:
        worker.scheduler.check()
        worker.scheduler.pool.check([])
        assert worker.scheduler.free_slots == max_num_seqs


@pytest.mark.parametrize("num_replicas", [1, 3, 8])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_nobody_is_admitted_before_one_who_waits_and_ranks_before_him(
    name: str, num_replicas: int, soak: bool
) -> None:
    """Not at the release (`Watched` looks), nor in the batch a step later, but for who came meanwhile."""
    rng = random.Random(name)
    cluster = Cluster(POLICIES[name], num_replicas, num_blocks=60, num_host_blocks=200)
    policy = POLICIES[name]()
    num_admissions = 100_000 if soak else 600
    while len(cluster.admissions) < num_admissions:
        if cluster.queue.num_waiting < 30 and rng.random() < 0.2 * num_replicas:
            cluster.submit(random_request(cluster, rng))
        cluster.step()
    if name in CONSTANT:
        for admission in cluster.admissions:
            for view in admission.overtaken:
                assert policy.rank(view, 0.0) >= policy.rank(admission.view, 0.0)
    drain(cluster)


# --- never starved


@settings(max_examples=60, deadline=None)
@given(
    alpha=st.sampled_from([0.5, 2.0, 10.0]),
    beta=st.sampled_from([0.5, 1.0, 4.0]),
    num_replicas=st.integers(1, 3),
    num_blocks=st.integers(20, 60),
    load=st.floats(0.05, 0.6),
    bursts=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_request_is_overtaken_only_by_who_came_within_the_bound(
    alpha: float, beta: float, num_replicas: int, num_blocks: int, load: float, bursts: bool, seed: int
) -> None:
    """Of a gap of d: `alpha * d / beta` seconds, and one step for what was under way."""
    rng = random.Random(seed)
    cluster = Cluster(lambda: PriorityAge(alpha, beta), num_replicas, num_blocks=num_blocks)
    for _ in range(300):
        if rng.random() < load:
            for _ in range(rng.choice([1, 5]) if bursts else 1):
                cluster.submit(random_request(cluster, rng, max_length=20))
        cluster.step()
    drain(cluster)
    for admission in cluster.admissions:
        for view in admission.overtaken:
            bound = alpha * (admission.view.priority - view.priority) / beta
            assert admission.view.arrival - view.arrival <= bound + 1e-9


def test_a_flood_of_higher_priority_does_not_starve_a_request() -> None:
    """Twice what the batch can take, for as long as it lasts: whoever overtakes came within the bound."""
    alpha, beta, gap = 4.0, 1.0, 2
    cluster = Cluster(lambda: PriorityAge(alpha, beta), max_num_seqs=2)
    low = a_request("low", [1, 2, 3], max_tokens=10)
    cluster.submit(low)
    while "low" not in cluster.ended:
        assert cluster.now < 100.0
        for _ in range(2):
            uid = str(len(cluster.requests))
            cluster.submit(a_request(uid, [len(uid)] * 4, priority=gap, arrival=cluster.now, max_tokens=2))
        cluster.step()
    assert cluster.queue.num_waiting > 50, "the flood goes on"
    times = [each.time for each in cluster.admissions if each.view.uid == "low"]
    before = [each for each in cluster.admissions if each.time < times[-1] and each.view.uid != "low"]
    assert len(before) > 50, "it was overtaken"
    assert max(each.view.arrival for each in before) <= alpha * gap / beta


@pytest.mark.parametrize("name", ["mlfq", "fair"])
def test_who_has_waited_too_long_goes_before_any_priority(name: str) -> None:
    """`starvation_seconds` is 8: the lowest class ends although the highest alone fills the batch."""
    cluster = Cluster(POLICIES[name], max_num_seqs=2, num_host_blocks=500)
    cluster.submit(a_request("low", [1, 2, 3], priority=-5, max_tokens=10))
    while "low" not in cluster.ended:
        assert cluster.now < 200.0
        while cluster.queue.num_waiting < 10:
            uid = str(len(cluster.requests))
            cluster.submit(
                a_request(uid, [len(uid)] * 4, priority=5, arrival=cluster.now, max_tokens=5, tenant="a")
            )
        cluster.step()
    assert cluster.ended["low"] >= 8.0


# --- fair


Demand = Callable[[random.Random], tuple[int, int]]
"""Draws the lengths of a request's prompt and answer."""
DEMANDS: dict[str, Demand] = {
    "long prompts": lambda rng: (rng.randint(30, 60), rng.randint(1, 4)),
    "long answers": lambda rng: (rng.randint(1, 4), rng.randint(30, 60)),
    "short": lambda rng: (rng.randint(1, 8), rng.randint(1, 8)),
    "mixed": lambda rng: (rng.randint(1, 60), rng.randint(1, 60)),
}


def keep_waiting(cluster: Cluster, tenant: str, demand: Demand, rng: random.Random, count: int) -> None:
    """Submits until that many of the tenant's requests wait."""
    waiting = sum(view.tenant == tenant for view in cluster.policy.waiting.values())
    for _ in range(count - waiting):
        num_prompt_tokens, num_output_tokens = demand(rng)
        uid = str(len(cluster.requests))
        prompt = [int(uid), *range(num_prompt_tokens - 1)]
        cluster.submit(
            a_request(uid, prompt, tenant=tenant, arrival=cluster.now, max_tokens=num_output_tokens)
        )


@settings(max_examples=25, deadline=None)
@given(
    demands=st.tuples(st.sampled_from(sorted(DEMANDS)), st.sampled_from(sorted(DEMANDS))),
    counts=st.tuples(st.sampled_from([7, 20]), st.sampled_from([7, 20])),
    max_num_seqs=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
def test_two_backlogged_tenants_are_served_alike(
    demands: tuple[str, str], counts: tuple[int, int], max_num_seqs: int, seed: int
) -> None:
    """VTC's bound, in any interval: 2 max(cost of the longest prompt, cost of what the batch holds).

    Backlogged: more of each wait than one step can take.
    """
    rng = random.Random(seed)
    cluster = Cluster(Fair, max_num_seqs=max_num_seqs, num_blocks=60, prefix_caching=False)
    lowest = highest = 0.0
    while sum(cluster.service.values()) < 12_000:
        for tenant, demand, count in zip("ab", demands, counts, strict=True):
            keep_waiting(cluster, tenant, DEMANDS[demand], rng, count)
        cluster.step()
        difference = cluster.service["a"] - cluster.service["b"]
        lowest, highest = min(lowest, difference), max(highest, difference)
    num_batch_tokens = min(60 * 4, max_num_seqs * 120)
    assert highest - lowest <= 2 * max(PROMPT_TOKEN_COST * 60, OUTPUT_TOKEN_COST * num_batch_tokens)


@pytest.mark.parametrize("weight", [2.0, 5.0])
@pytest.mark.parametrize("demand", sorted(DEMANDS))
def test_shares_are_those_of_the_weights(demand: str, weight: float) -> None:
    rng = random.Random(demand)
    cluster = Cluster(lambda: Fair({"b": weight}), num_blocks=60, prefix_caching=False)
    while sum(cluster.service.values()) < 40_000:
        for tenant in "ab":
            keep_waiting(cluster, tenant, DEMANDS[demand], rng, 10)
        cluster.step()
    assert cluster.service["b"] / cluster.service["a"] == pytest.approx(weight, rel=0.05)


# --- a small cache


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_small_cache_does_not_thrash(name: str) -> None:
    """It holds six in ten of what the batch would like; host memory holds what is evicted."""
    rng = random.Random(name)
    cluster = Cluster(
        POLICIES[name],
        block_size=4,
        num_blocks=48,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        num_host_blocks=2000,
    )
    for _ in range(1500):
        if rng.random() < 0.3:
            cluster.submit(random_request(cluster, rng, max_n=1))
        cluster.step()
    drain(cluster)
    scheduler = cluster.workers[0].scheduler
    assert scheduler.num_recomputed_tokens <= 0.02 * cluster.num_computed
    assert cluster.num_bounced <= len(cluster.admissions)
