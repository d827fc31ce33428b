"""docs/api.md says what the tables of the API and the metrics say."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from fastserve.config import Config
from fastserve.ensemble.api_tensors import API_INPUTS, API_OUTPUTS, TensorSpec
from fastserve.scheduling.request_labels import RequestLabels
from fastserve.types import Outcome

DOCUMENT = (Path(__file__).parents[2] / "docs/api.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the rows of the first table under a heading."""
    section = DOCUMENT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| `")
    ]


@pytest.mark.parametrize(("heading", "specs"), [("Inputs", API_INPUTS), ("Outputs", API_OUTPUTS)])
def test_tensors(heading: str, specs: dict[str, TensorSpec]) -> None:
    documented = {
        row[0].strip("`"): (f"TYPE_{row[1].split()[0]}", -1 if re.search(r"\[(?:n|-1)\]", row[1]) else 1)
        for row in rows(heading)
    }
    assert documented == {name: (spec.data_type, spec.length) for name, spec in specs.items()}


def test_metrics(pb_utils: Any) -> None:
    from fastserve.ensemble.metrics import EngineMetrics, QueueMetrics, ResponseMetrics, SecondsByClass

    labels = RequestLabels(Config())
    members = [
        each
        for metrics in (QueueMetrics(labels, 1), EngineMetrics(), ResponseMetrics(labels))
        for each in vars(metrics).values()
    ]
    pairs = [vars(each).values() for each in members if isinstance(each, SecondsByClass)]
    families = [each for each in [*members, *chain(*pairs)] if hasattr(each, "kind")]
    assert {each._family._name for each in families} == set(pb_utils.server.metrics)
    assert {row[0].strip("`") for row in rows("Metrics")} == set(pb_utils.server.metrics)
    kinds = {row[0].strip("`"): (row[1], re.findall(r"`(\w+)`", row[2])) for row in rows("Metrics")}
    for family in families:
        name = family._family._name
        assert kinds[name] == (family.kind.name.lower(), list(family._labels)), name
    (outcomes,) = (row[4] for row in rows("Metrics") if row[0] == "`fastserve_requests_total`")
    assert re.findall(r"`(\w+)`", outcomes) == [each.value for each in Outcome]
