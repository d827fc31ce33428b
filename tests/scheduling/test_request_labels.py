"""Labels in metrics: few, and each says which requests it stands for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.config import Config, TenantQuota
from fastserve.scheduling.request_labels import (
    MAX_PRIORITIES,
    MAX_TENANTS,
    Labels,
    PriorityLabels,
    RequestLabels,
    TenantLabels,
)
from fastserve.types import RequestView


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (-10, 10, {-10: -10, 0: 0, 10: 10}),
        (0, 20, {0: 0, 7: 7, 20: 20}),
        (-100, 100, {-100: -100, -91: -100, -90: -90, -1: -10, 0: 0, 9: 0, 100: 100}),
        (0, 21, {0: 0, 1: 0, 2: 2, 21: 20}),
    ],
)
def test_a_priority_has_its_own_label_or_that_of_its_group(
    low: int, high: int, labels: dict[int, int]
) -> None:
    priorities = PriorityLabels(low, high)
    assert {priority: priorities.label(priority) for priority in labels} == labels


@given(st.integers(-(2**31), 0), st.integers(0, 2**31 - 1), st.data())
def test_there_are_few_labels_and_they_keep_the_order(low: int, high: int, data: st.DataObject) -> None:
    priorities = PriorityLabels(low, high)
    chosen = sorted([low, high, *data.draw(st.lists(st.integers(low, high), max_size=60))])
    labels = [priorities.label(priority) for priority in chosen]
    assert labels == sorted(labels)
    assert len(set(labels)) <= MAX_PRIORITIES
    assert all(low <= label <= priority for label, priority in zip(labels, chosen, strict=True))
    if high - low < MAX_PRIORITIES:
        assert labels == chosen


def test_the_first_tenants_have_a_label_of_their_own() -> None:
    tenants = TenantLabels()
    labels = [tenants.label(f"tenant {number}") for number in range(MAX_TENANTS + 5)]
    assert labels[:MAX_TENANTS] == [f"tenant {number}" for number in range(MAX_TENANTS)]
    assert set(labels[MAX_TENANTS:]) == {"other"}
    assert tenants.label("tenant 0") == "tenant 0"


def test_a_tenant_that_the_settings_name_always_has_one() -> None:
    labels = RequestLabels(
        Config(
            tenant_quotas={"*": TenantQuota(tokens_in_flight=9), "late": TenantQuota(tokens_in_flight=9)},
            tenant_weights={"later": 2.0},
            priority_range=(-100, 100),
        )
    )

    def of(tenant: str, priority: int = 0) -> Labels:
        return labels.of(RequestView("", 0, priority, 0.0, tenant, 1, 1, waiting_since=0.0, num_tokens=1))

    for number in range(MAX_TENANTS):
        of(f"tenant {number}")
    assert [of(each).tenant for each in ("late", "later", "*", "latest")] == [
        "late",
        "later",
        "other",
        "other",
    ]
    assert of("late", 57) == Labels(50, "late")
