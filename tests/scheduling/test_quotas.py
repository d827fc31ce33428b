"""Quotas of tenants: never more than the token bucket's bound, no one else's business, and true waits."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.config import Config, TenantQuota
from fastserve.errors import ErrorCode, RequestError
from fastserve.scheduling import quotas as module
from fastserve.scheduling.admission import AdmissionQueue
from fastserve.scheduling.capacity import EngineCapacity, Finished, ReplicaCapacity
from fastserve.scheduling.policies.fcfs import FCFS
from fastserve.scheduling.quotas import LOST_AFTER_SECONDS, QuotaError, Quotas
from fastserve.types import OutputOptions, Request, SamplingParams


def a_request(
    uid: str, tenant: str = "a", num_prompt_tokens: int = 1, deadline: float | None = None, **sampling: Any
) -> Request:
    params = SamplingParams(**{"max_tokens": 1, **sampling})
    return Request(uid, "", "", [1] * num_prompt_tokens, params, OutputOptions(), 0, tenant, 0.0, deadline)


def refusal(quotas: Quotas, request: Request, now: float = 0.0) -> QuotaError:
    with pytest.raises(QuotaError) as caught:
        quotas.admit(request, now)
    assert caught.value.code is ErrorCode.UNAVAILABLE
    return caught.value


def test_the_sentence_names_tenant_quota_and_seconds() -> None:
    quotas = Quotas({"a": TenantQuota(requests_per_second=0.5, burst_seconds=1)})
    quotas.admit(a_request("1"), 0.0)
    error = refusal(quotas, a_request("2"), 0.5)
    assert str(error) == (
        "tenant 'a' is over its quota of 0.5 requests per second (`requests_per_second`); "
        "try again in 1.501 s"
    )
    assert (error.quota, error.retry_after) == ("requests_per_second", pytest.approx(1.501))
    quotas.admit(a_request("2"), 0.5 + error.retry_after)


def test_tokens_are_the_prompt_and_all_that_its_answers_may_have() -> None:
    quotas = Quotas({"a": TenantQuota(tokens_per_second=10, burst_seconds=10)})
    quotas.admit(a_request("1", num_prompt_tokens=20, n=2, max_tokens=30), 0.0)
    error = refusal(quotas, a_request("2", num_prompt_tokens=20, max_tokens=31), 0.0)
    assert "10 tokens per second: the request needs 51 (`tokens_per_second`)" in str(error)
    assert error.retry_after == pytest.approx((51 - 20) / 10, abs=0.01)
    quotas.end("1", num_tokens=20 + 29)  # 31 of them were not generated
    quotas.admit(a_request("2", num_prompt_tokens=20, max_tokens=31), 0.0)
    refusal(quotas, a_request("3"), 0.0)


def test_tokens_in_flight_are_free_when_their_request_has_ended() -> None:
    quotas = Quotas({"a": TenantQuota(tokens_in_flight=10)})
    quotas.admit(a_request("1", num_prompt_tokens=5, max_tokens=2), 0.0)
    error = refusal(quotas, a_request("2", num_prompt_tokens=3), 1e9)
    assert "10 tokens in flight: 7 are, the request needs 4 (`tokens_in_flight`)" in str(error)
    quotas.end("1", 7)
    quotas.end("1", 7)
    quotas.end("never seen", 7)
    quotas.admit(a_request("2", num_prompt_tokens=9), 0.0)
    refusal(quotas, a_request("3"), 0.0)
    assert quotas.num_in_flight == 1


@pytest.mark.parametrize(
    ("quota", "limit"),
    [
        (TenantQuota(tokens_in_flight=50), r"at most 50 at once for tenant 'a' \(`tokens_in_flight`\)"),
        (
            TenantQuota(tokens_per_second=5, burst_seconds=2),
            r"at most 10 at once .* \(`tokens_per_second`\)",
        ),
    ],
)
def test_what_no_wait_would_admit_is_the_clients_fault(quota: TenantQuota, limit: str) -> None:
    quotas = Quotas({"a": quota})
    sentence = r"prompt and `max_tokens`: got 51 tokens; allowed: " + limit
    with pytest.raises(RequestError, match=sentence) as caught:
        quotas.admit(a_request("1", max_tokens=50), 0.0)
    assert caught.value.code is ErrorCode.INVALID_ARG


def test_of_several_quotas_the_one_that_takes_longest_is_told() -> None:
    quotas = Quotas({"a": TenantQuota(requests_per_second=0.5, tokens_per_second=2, burst_seconds=4)})
    for uid in ("1", "2"):
        quotas.admit(a_request(uid, max_tokens=3), 0.0)
    assert refusal(quotas, a_request("3", max_tokens=7), 0.0).quota == "tokens_per_second"
    assert refusal(quotas, a_request("3", max_tokens=1), 0.0).quota == "requests_per_second"


def test_the_default_is_each_tenants_own_and_a_name_goes_before_it() -> None:
    one = TenantQuota(requests_per_second=0.1, burst_seconds=1)
    quotas = Quotas({"*": one, "paying": TenantQuota(requests_per_second=100)})
    for tenant in ("x", "y", ""):
        quotas.admit(a_request(tenant, tenant), 0.0)
        refusal(quotas, a_request("again", tenant), 0.0)
    for number in range(100):
        quotas.admit(a_request(f"paying {number}", "paying"), 0.0)


def test_without_a_quota_nothing_is_kept() -> None:
    quotas = Quotas({"a": TenantQuota(tokens_in_flight=1000)})
    for number in range(1000):
        quotas.admit(a_request(str(number), f"tenant {number}"), 0.0)
    assert (quotas.num_tenants, quotas.num_in_flight) == (0, 0)


def test_what_is_kept_of_freely_named_tenants_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TENANTS", 10)
    default = TenantQuota(requests_per_second=1, burst_seconds=2)
    quotas = Quotas({"*": default, "b": TenantQuota(tokens_in_flight=9)})
    refused = 0
    for number in range(1000):
        try:
            quotas.admit(a_request(str(number), f"tenant {number}"), 0.0)
        except QuotaError:
            refused += 1
        quotas.end(str(number), 2)
        assert quotas.num_tenants <= 10 + 2 + 1  # those that the settings name, and what the others share
    assert refused == 1000 - 12 - 2
    quotas.admit(a_request("b", "b"), 0.0)
    refusal(quotas, a_request("new", "one more"), 0.5)
    for number in range(11):  # two seconds later all the buckets are full, and forgotten when room is needed
        quotas.admit(a_request(f"later {number}", f"new tenant {number}"), 2.0)


def test_a_request_of_which_no_end_is_told_ends_after_its_deadline() -> None:
    quotas = Quotas({"a": TenantQuota(tokens_in_flight=2)})
    quotas.admit(a_request("lost", deadline=10.0), 0.0)
    refusal(quotas, a_request("2"), 10.0 + LOST_AFTER_SECONDS - 1)
    quotas.admit(a_request("2"), 10.0 + 2 * LOST_AFTER_SECONDS)


def test_a_tenant_whose_bucket_is_not_full_is_not_forgotten() -> None:
    quotas = Quotas({"*": TenantQuota(requests_per_second=0.001)})
    quotas.admit(a_request("1"), 0.0)
    quotas.end("1", 2)
    quotas.admit(a_request("other", "b"), 10 * LOST_AFTER_SECONDS)  # looks for those that can be forgotten
    refusal(quotas, a_request("2"), 10 * LOST_AFTER_SECONDS)


def test_a_uid_that_comes_twice_is_one_request() -> None:
    quotas = Quotas({"a": TenantQuota(tokens_in_flight=5)})
    quotas.admit(a_request("1"), 0.0)
    quotas.admit(a_request("1"), 0.0)
    quotas.end("1", 2)
    quotas.admit(a_request("2", num_prompt_tokens=4), 0.0)


def test_so_many_requests_are_in_flight_and_no_more() -> None:
    quotas = Quotas({"a": TenantQuota(requests_in_flight=2)})
    quotas.admit(a_request("1"), 0.0)
    quotas.admit(a_request("2"), 0.0)
    error = refusal(quotas, a_request("3"))
    assert (
        "tenant 'a' is over its quota of 2 requests in flight (`requests_in_flight`); try again in 1."
        in str(error)
    )
    quotas.end("1", 0)
    quotas.admit(a_request("3"), 0.0)


def test_other_quotas_hold_from_the_next_request_on_and_what_is_in_flight_stays() -> None:
    both = {name: TenantQuota(requests_in_flight=1, tokens_per_second=10, burst_seconds=10) for name in "ab"}
    quotas = Quotas(both)
    quotas.admit(a_request("1", num_prompt_tokens=20, max_tokens=70), 0.0)
    quotas.replace(both | {"b": TenantQuota(requests_per_second=1)})
    assert refusal(quotas, a_request("2", num_prompt_tokens=1, max_tokens=39)).quota == "tokens_per_second"
    quotas.replace({"a": TenantQuota(requests_in_flight=2, tokens_in_flight=100)})
    quotas.admit(a_request("2", num_prompt_tokens=1, max_tokens=9), 0.0)
    assert refusal(quotas, a_request("3", num_prompt_tokens=1, max_tokens=1)).quota in (
        "requests_in_flight",
        "tokens_in_flight",
    )
    quotas.replace({})
    quotas.admit(a_request("3"), 0.0)
    quotas.end("1", 0)


# --- properties

RATES = st.floats(0.01, 1000)
TENANTS = st.sampled_from(["a", "b", "c"])
ARRIVALS = st.lists(
    st.tuples(st.floats(0, 5), TENANTS, st.integers(1, 40), st.integers(1, 40), st.floats(0, 1)),
    min_size=1,
    max_size=60,
)
"""Seconds since the one before, tenant, prompt tokens, `max_tokens`, and what decides how it ends."""


class Tally:
    """What was admitted of one tenant, and when."""

    def __init__(self) -> None:
        self.charges: list[tuple[float, float]] = []

    def check(self, rate: float, burst: float) -> None:
        """In no interval more than rate * t + burst."""
        for first, (start, _) in enumerate(self.charges):
            total = 0.0
            for time, amount in self.charges[first:]:
                total += amount
                assert total <= rate * (time - start) + burst + 1e-6


@given(ARRIVALS, RATES, RATES, st.floats(0.1, 20))
def test_no_more_is_admitted_than_the_bucket_allows(
    arrivals: list[tuple[float, str, int, int, float]],
    requests_rate: float,
    tokens_rate: float,
    burst_seconds: float,
) -> None:
    quota = TenantQuota(
        requests_per_second=requests_rate, tokens_per_second=tokens_rate, burst_seconds=burst_seconds
    )
    quotas = Quotas({"*": quota})
    requests: dict[str, Tally] = defaultdict(Tally)
    tokens: dict[str, Tally] = defaultdict(Tally)
    now = 100.0
    for number, (gap, tenant, num_prompt_tokens, max_tokens, share) in enumerate(arrivals):
        now += gap
        request = a_request(str(number), tenant, num_prompt_tokens, max_tokens=max_tokens)
        try:
            quotas.admit(request, now)
        except RequestError:
            continue
        requests[tenant].charges.append((now, 1))
        tokens[tenant].charges.append((now, request.max_total_tokens))
        if share < 0.5:  # it ends at once: what it did not generate comes back
            unused = int(max_tokens * share)
            quotas.end(str(number), request.max_total_tokens - unused)
            tokens[tenant].charges[-1] = (now, request.max_total_tokens - unused)
    for tenant in requests:
        requests[tenant].check(requests_rate, max(1.0, requests_rate * burst_seconds))
        tokens[tenant].check(tokens_rate, max(1.0, tokens_rate * burst_seconds))


@given(ARRIVALS, RATES)
def test_others_are_served_as_if_they_were_alone(
    arrivals: list[tuple[float, str, int, int, float]], rate: float
) -> None:
    """What becomes of a's requests is the same without those of b and c."""
    quota = TenantQuota(
        requests_per_second=rate, tokens_per_second=20 * rate, tokens_in_flight=90, burst_seconds=4
    )

    def outcomes(tenants: str) -> list[str]:
        quotas, now, seen = Quotas({"*": quota}), 0.0, []
        for number, (gap, tenant, num_prompt_tokens, max_tokens, share) in enumerate(arrivals):
            now += gap
            if tenant not in tenants:
                continue
            outcome = "admitted"
            try:
                quotas.admit(a_request(str(number), tenant, num_prompt_tokens, max_tokens=max_tokens), now)
            except RequestError as error:
                outcome = str(error)
            if share < 0.7:
                quotas.end(str(number), num_prompt_tokens)
            if tenant == "a":
                seen.append(outcome)
        return seen

    assert outcomes("abc") == outcomes("a")


@given(ARRIVALS, RATES, st.floats(0.1, 20))
def test_who_waits_as_told_is_admitted(
    arrivals: list[tuple[float, str, int, int, float]], rate: float, burst_seconds: float
) -> None:
    """Of the rates: nobody knows when tokens in flight are free."""
    quota = TenantQuota(requests_per_second=rate, tokens_per_second=40 * rate, burst_seconds=burst_seconds)
    quotas, now = Quotas({"*": quota}), 1e6
    for number, (gap, tenant, num_prompt_tokens, max_tokens, _) in enumerate(arrivals):
        now += gap
        request = a_request(str(number), tenant, num_prompt_tokens, max_tokens=max_tokens)
        try:
            quotas.admit(request, now)
        except QuotaError as error:
            told = re.search(r"try again in ([\d.]+) s$", str(error))
            assert told is not None
            quotas.admit(request, now := now + float(told[1]))
        except RequestError as error:
            if error.code is not ErrorCode.INVALID_ARG:
                raise


# --- in the common queue


def a_queue(quotas: dict[str, TenantQuota], max_queue_size: int = 10) -> AdmissionQueue:
    queue = AdmissionQueue(FCFS(), max_queue_size, 0.0, Quotas(quotas))
    queue.update(a_capacity(1), 0.0)
    return queue


def a_capacity(serial: int, *finished: Finished, max_model_len: int | None = None) -> EngineCapacity:
    replica = ReplicaCapacity("a", 0, 0, free_slots=1, free_blocks=100, free_tokens=100, num_running=0)
    return EngineCapacity(
        serial, float(serial), [replica], serial, list(finished), block_size=16, max_model_len=max_model_len
    )


def test_a_request_over_the_quota_does_not_wait_and_others_do() -> None:
    queue = a_queue({"a": TenantQuota(tokens_in_flight=4)})
    queue.submit(a_request("1"), 0.0)
    queue.submit(a_request("2"), 0.0)
    with pytest.raises(QuotaError):
        queue.submit(a_request("3"), 0.0)
    queue.submit(a_request("4", "b"), 0.0)
    assert queue.num_waiting == 3


def test_a_request_that_finished_is_in_flight_no_more() -> None:
    queue = a_queue({"a": TenantQuota(tokens_in_flight=2)})
    queue.submit(a_request("1"), 0.0)
    assert [each.request.uid for each in queue.release(0.0)] == ["1"]
    with pytest.raises(QuotaError):
        queue.submit(a_request("2"), 1.0)
    queue.update(a_capacity(2, Finished("1", 2)), 2.0)
    queue.submit(a_request("2"), 2.0)


def test_a_request_that_leaves_the_queue_unserved_gives_all_its_tokens_back() -> None:
    queue = a_queue({"a": TenantQuota(tokens_per_second=1, tokens_in_flight=20, burst_seconds=20)})
    queue.submit(a_request("late", max_tokens=19, deadline=1.0), 0.0)
    assert [each.uid for each in queue.expire(1.0)] == ["late"]
    queue.submit(a_request("long", num_prompt_tokens=19), 1.0)
    queue.update(a_capacity(2, max_model_len=8), 1.0)
    assert [request.uid for request, _ in queue.refuse_too_long()] == ["long"]
    queue.submit(a_request("next", max_tokens=19), 1.0)


def test_a_full_queue_charges_nobody() -> None:
    queue = a_queue({"a": TenantQuota(requests_per_second=0.001)}, max_queue_size=1)
    queue.submit(a_request("b", "b"), 0.0)
    with pytest.raises(RequestError, match="the queue is full"):
        queue.submit(a_request("1"), 0.0)
    queue.release(0.0)
    queue.submit(a_request("1"), 0.0)


# --- settings


def test_quotas_travel_in_the_settings() -> None:
    config = Config(tenant_quotas={"*": TenantQuota(requests_per_second=2)})
    assert msgspec.json.decode(msgspec.json.encode(config), type=Config) == config
