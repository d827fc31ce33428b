"""Quotas of tenants: what each may ask for, in requests and tokens a second and in flight.

A rate is a token bucket (RFC 2215): it holds at most `burst = max(1, rate * burst_seconds)`, fills at `rate`,
and a request is admitted if it holds what the request costs, which is then taken out. So in any `t` seconds
at most `rate * t + burst` is admitted, and a tenant that was idle for `burst_seconds` may use all of that at
once.

A request costs one request, and as tokens its prompt and the most that its answers may have, since nobody
knows how long they will be. What was not computed comes back when it has ended.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fastserve.config import TenantQuota
from fastserve.errors import ErrorCode, RequestError

DEFAULT = "*"
"""In the settings: each tenant that is not named."""
MAX_TENANTS = 10_000
"""Not named in the settings, with buckets of their own: clients name tenants freely. The others share."""
IN_FLIGHT_RETRY_SECONDS = 1.0
"""To wait for what is in flight: nobody knows when a request will end."""
SWEEP_SECONDS = 1.0
"""Between two searches for tenants that can be forgotten, at least."""
LOST_AFTER_SECONDS = 60.0
"""After its deadline a request of which no end was told has ended all the same."""
_RESOLUTION = 1e-3
"""Of the seconds to wait that a client is told: rounded up, and one more against rounding here."""


class Charged(Protocol):
    """What quotas go by, of a request."""

    @property
    def uid(self) -> str:
        """Its own."""

    @property
    def tenant(self) -> str:
        """Who pays."""

    @property
    def deadline(self) -> float | None:
        """When it has ended at the latest."""

    @property
    def max_total_tokens(self) -> int:
        """Its prompt's, and the most that its answers may have."""


class QuotaError(RequestError):
    """A tenant is over a quota (UNAVAILABLE)."""

    def __init__(self, tenant: str, quota: str, limit: str, retry_after: float) -> None:
        """`quota`: the field of `TenantQuota`; `limit`: in words; `retry_after`: seconds."""
        self.quota = quota
        self.retry_after = (math.ceil(retry_after / _RESOLUTION) + 1) * _RESOLUTION
        super().__init__(
            f"tenant {tenant!r} is over its quota of {limit} (`{quota}`); "
            f"try again in {self.retry_after:.3f} s",
            ErrorCode.UNAVAILABLE,
        )


@dataclass(slots=True)
class _Bucket:
    rate: float
    """Per second."""
    burst: float
    level: float
    time: float
    """At which it held `level`."""

    def level_at(self, now: float) -> float:
        return min(self.burst, self.level + self.rate * max(0.0, now - self.time))

    def take(self, amount: float, now: float) -> None:
        self.level, self.time = self.level_at(now) - amount, max(self.time, now)

    def put_back(self, amount: float) -> None:
        self.level += amount

    def seconds_until(self, amount: float, now: float) -> float:
        """0 if it holds so much now."""
        return max(0.0, (amount - self.level_at(now)) / self.rate)


@dataclass(slots=True)
class _Tenant:
    quota: TenantQuota
    requests: _Bucket | None = None
    tokens: _Bucket | None = None
    tokens_in_flight: int = 0
    requests_in_flight: int = 0

    def set_quota(self, quota: TenantQuota, now: float) -> None:
        """Another quota, with full buckets; what is in flight stays so."""
        self.quota = quota
        self.requests = _new_bucket(quota.requests_per_second, quota.burst_seconds, now)
        self.tokens = _new_bucket(quota.tokens_per_second, quota.burst_seconds, now)

    def is_as_new(self, now: float) -> bool:
        """Whether forgetting it changes nothing."""
        buckets = [each for each in (self.requests, self.tokens) if each is not None]
        return not self.requests_in_flight and all(each.level_at(now) >= each.burst for each in buckets)


@dataclass(frozen=True, slots=True)
class _InFlight:
    tenant: _Tenant
    num_tokens: int
    deadline: float | None


class Quotas:
    """Admits requests within the quotas of their tenants, and learns how they end.

    A tenant's quota is the one under its name, else the one under DEFAULT, else there is none. Nothing is
    kept of tenants that have none, and what is kept of tenants that the settings do not name is bounded.
    """

    def __init__(self, quotas: Mapping[str, TenantQuota]) -> None:
        """`quotas`: by tenant."""
        self._quotas = dict(quotas)
        self._tenants: dict[str | None, _Tenant] = {}
        """None: those that share."""
        self._in_flight: dict[str, _InFlight] = {}
        """By uid."""
        self._last_sweep = -math.inf

    def admit(self, request: Charged, now: float) -> None:
        """Charges a request to its tenant.

        Raises QuotaError if the tenant is over a quota now, and RequestError (INVALID_ARG) for a request that
        is larger than the quota ever allows. Nothing is charged then.
        """
        quota = self._quotas.get(request.tenant, self._quotas.get(DEFAULT))
        if quota is None:
            return
        if now >= self._last_sweep + LOST_AFTER_SECONDS:
            self._sweep(now)
        name = self._name(request.tenant, now)
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = _Tenant(quota)
            tenant.set_quota(quota, now)
        elif tenant.quota != quota:
            tenant.set_quota(quota, now)
        num_tokens = request.max_total_tokens
        _check(request.tenant, tenant, num_tokens, now)
        self._tenants[name] = tenant
        self.end(request.uid, num_tokens)  # sent twice, it is one request to the engine
        for bucket, amount in ((tenant.requests, 1), (tenant.tokens, num_tokens)):
            if bucket is not None:
                bucket.take(amount, now)
        tenant.tokens_in_flight += num_tokens
        tenant.requests_in_flight += 1
        self._in_flight[request.uid] = _InFlight(tenant, num_tokens, request.deadline)

    def replace(self, quotas: Mapping[str, TenantQuota]) -> None:
        """Other quotas hold from the next request on. What is in flight, and the level of each bucket whose
        tenant's quota is the same, stays."""
        self._quotas = dict(quotas)

    def end(self, uid: str, num_tokens: int) -> None:
        """A request has ended, for which so many tokens of prompt and answers were computed.

        One that is not known, as it has no quota or has ended before, changes nothing.
        """
        in_flight = self._in_flight.pop(uid, None)
        if in_flight is None:
            return
        tenant = in_flight.tenant
        tenant.tokens_in_flight -= in_flight.num_tokens
        tenant.requests_in_flight -= 1
        if tenant.tokens is not None:
            tenant.tokens.put_back(max(0, in_flight.num_tokens - num_tokens))

    @property
    def num_tenants(self) -> int:
        """Of which something is kept."""
        return len(self._tenants)

    @property
    def num_in_flight(self) -> int:
        """Requests that were admitted, of tenants with a quota, and have not ended."""
        return len(self._in_flight)

    def _name(self, tenant: str, now: float) -> str | None:
        """Under which the tenant is kept."""
        if tenant in self._quotas or tenant in self._tenants:
            return tenant
        limit = MAX_TENANTS + len(self._quotas)
        if len(self._tenants) >= limit and now >= self._last_sweep + SWEEP_SECONDS:
            self._sweep(now)
        return tenant if len(self._tenants) < limit else None

    def _sweep(self, now: float) -> None:
        """Ends the requests whose end got lost, and forgets the tenants that are as new."""
        self._last_sweep = now
        for uid, each in list(self._in_flight.items()):
            if each.deadline is not None and each.deadline + LOST_AFTER_SECONDS <= now:
                self.end(uid, each.num_tokens)
        self._tenants = {name: each for name, each in self._tenants.items() if not each.is_as_new(now)}


def _new_bucket(rate: float | None, burst_seconds: float, now: float) -> _Bucket | None:
    """A full one, which holds 1 at least: one request can always be admitted some time."""
    if rate is None:
        return None
    burst = max(1.0, rate * burst_seconds)
    return _Bucket(rate, burst, burst, now)


def _check(name: str, tenant: _Tenant, num_tokens: int, now: float) -> None:
    """Raises what `Quotas.admit` raises; of several quotas, for the one that takes longest."""
    quota, errors = tenant.quota, []
    if quota.tokens_in_flight is not None:
        _check_size(name, "tokens_in_flight", num_tokens, quota.tokens_in_flight)
        if tenant.tokens_in_flight + num_tokens > quota.tokens_in_flight:
            limit = (
                f"{quota.tokens_in_flight} tokens in flight: {tenant.tokens_in_flight} are, "
                f"the request needs {num_tokens}"
            )
            errors.append(QuotaError(name, "tokens_in_flight", limit, IN_FLIGHT_RETRY_SECONDS))
    if quota.requests_in_flight is not None and tenant.requests_in_flight >= quota.requests_in_flight:
        limit = f"{quota.requests_in_flight} requests in flight"
        errors.append(QuotaError(name, "requests_in_flight", limit, IN_FLIGHT_RETRY_SECONDS))
    if tenant.tokens is not None:
        _check_size(name, "tokens_per_second", num_tokens, int(tenant.tokens.burst))
        if wait := tenant.tokens.seconds_until(num_tokens, now):
            limit = f"{tenant.tokens.rate:g} tokens per second: the request needs {num_tokens}"
            errors.append(QuotaError(name, "tokens_per_second", limit, wait))
    if tenant.requests is not None and (wait := tenant.requests.seconds_until(1, now)):
        limit = f"{tenant.requests.rate:g} requests per second"
        errors.append(QuotaError(name, "requests_per_second", limit, wait))
    if errors:
        raise max(errors, key=lambda error: error.retry_after)


def _check_size(name: str, quota: str, num_tokens: int, limit: int) -> None:
    if num_tokens > limit:
        raise RequestError(
            f"prompt and `max_tokens`: got {num_tokens} tokens; allowed: at most {limit} at once for tenant "
            f"{name!r} (`{quota}`)"
        )
