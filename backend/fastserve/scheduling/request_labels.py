"""The labels of requests in metrics: what clients name freely, within a bounded set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fastserve.config import Config
from fastserve.types import Request, RequestView

MAX_PRIORITIES = 21
"""Labels of priorities."""
MAX_TENANTS = 64
"""Tenants with a label of their own beside those that the settings name: the first that come."""
MAX_TENANT_LENGTH = 64
"""Characters of a tenant in its label."""
OTHER = "other"
"""The label of what the tenants without one of their own use."""


class PriorityLabels:
    """At most MAX_PRIORITIES labels for the priorities that requests may have.

    A range of no more than that has one for each. A wider one is cut, from its lowest priority on, into
    groups of equal width, as narrow as can be; a group's label is its lowest priority.
    """

    def __init__(self, low: int, high: int) -> None:
        """`low`, `high`: the range, both ends in it."""
        self._low = low
        self._width = -(-(high - low + 1) // MAX_PRIORITIES)

    def label(self, priority: int) -> int:
        """The label of a priority."""
        return self._low + (priority - self._low) // self._width * self._width


class TenantLabels:
    """A bounded set of labels for what clients name freely."""

    def __init__(self, named: Iterable[str] = ()) -> None:
        """`named`: tenants that have a label of their own whenever they come."""
        self._labels = {tenant: tenant[:MAX_TENANT_LENGTH] for tenant in named}
        self._max_labels = len(self._labels) + MAX_TENANTS

    def label(self, tenant: str) -> str:
        """The label of a tenant: cut to MAX_TENANT_LENGTH, or OTHER beyond MAX_TENANTS."""
        known = self._labels.get(tenant)
        if known is not None:
            return known
        if len(self._labels) >= self._max_labels:
            return OTHER
        return self._labels.setdefault(tenant, tenant[:MAX_TENANT_LENGTH])


class Labels(NamedTuple):
    """Of one request."""

    priority: int
    tenant: str


class RequestLabels:
    """The labels of requests under these settings."""

    def __init__(self, config: Config) -> None:
        self._priorities = PriorityLabels(*config.priority_range)
        self._tenants = TenantLabels({*config.tenant_quotas, *config.tenant_weights} - {"*"})

    def of(self, request: Request | RequestView) -> Labels:
        """Of one request, or of a sequence of it."""
        return Labels(self._priorities.label(request.priority), self._tenants.label(request.tenant))
