"""The page of plots: well formed, self-contained, and with everything that the report knows."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.compression.calibration.linear_report import LinearReport
from fastserve.compression.report.report import ModelFigures, Report, StepReport
from fastserve.compression.report.report_page import page, plots, write_page
from fastserve.compression.report.svg_plot import Plot, Series, svg, ticks
from fastserve.compression.training.trainer import Point

FINITE = st.floats(-1e9, 1e9, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-9)


def linear(layer: int, kind: str, rank: int | None = None) -> LinearReport:
    return LinearReport(
        f"model.layers.{layer}.{kind}", "Int4", 4.25, None, rank, 0.1 + layer, 0.02 * (layer + 1)
    )


@pytest.fixture
def report() -> Report:
    kinds = ("self_attn.q_proj", "mlp.down_proj")
    return Report(
        model="<original>",
        result="out/small & fast",
        recipe={"steps": [{"step": "gptq"}, {"step": "distill"}]},
        before=ModelFigures(2_000_000, perplexity=20.0),
        after=ModelFigures(1_000_000, perplexity=21.0),
        kl=0.01,
        top1_agreement=0.9,
        evaluated_tokens=5110,
        steps=[
            StepReport("gptq", [linear(i, kind) for i in range(3) for kind in kinds], [], {"note": "<b>"}),
            StepReport("distill", [], [Point(0, 0, 0, None, 4.0), Point(9, 900, 1.5, 3.9, 3.5)], {}),
        ],
        machine="a processor",
        versions={"python": "3.11"},
        date="2026-11-21T15:00:00+00:00",
        seconds=12.5,
    )


class _Balance(HTMLParser):
    """Checks that every element is closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass


def test_the_page_is_well_formed_and_fetches_nothing(report: Report, tmp_path: Path) -> None:
    write_page(report, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    balance = _Balance()
    balance.feed(text)
    assert balance.open == []
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|@import", text)


def test_names_are_escaped(report: Report) -> None:
    text = page(report)
    assert "<h1>small &amp; fast</h1>" in text
    assert "&lt;original&gt;" in text
    assert "&lt;b&gt;" in text


def test_the_page_shows_every_linear_and_the_whole_model(report: Report) -> None:
    text = page(report)
    assert all(found.name in text for found in report.steps[0].linears)
    assert "<td>perplexity</td><td>20.000</td><td>21.000</td><td>+5.00%</td>" in text


def test_only_what_is_known_and_not_the_same_everywhere_is_plotted(report: Report) -> None:
    quantized, distilled = (plots(step) for step in report.steps)
    assert [plot.title for plot in quantized] == ["Output error", "Weight error"]
    assert [series.name for series in quantized[0].series] == ["self_attn.q_proj", "mlp.down_proj"]
    assert quantized[0].series[1].points == [(0, 0.02), (1, 0.04), (2, 0.06)]
    assert [plot.title for plot in distilled] == ["Loss"]
    assert distilled[0].series == [
        Series("held-out text", [(0, 4.0), (1.5, 3.5)]),
        Series("training", [(1.5, 3.9)]),
    ]


def test_ranks_are_plotted_for_the_linears_that_have_one() -> None:
    linears = [linear(0, "mlp.up_proj", 16), linear(0, "mlp.down_proj"), linear(1, "mlp.up_proj", 24)]
    (ranks,) = (plot for plot in plots(StepReport("low_rank", linears, [], {})) if plot.title == "Rank")
    assert ranks.series == [Series("mlp.up_proj", [(0, 16), (1, 24)])]


def test_sparsity_is_plotted_for_the_linears_that_were_pruned() -> None:
    pruned = [
        dataclasses.replace(linear(i, "mlp.up_proj"), format="Bitmap", sparsity=0.1 + i) for i in range(2)
    ]
    found = [linear(i, "mlp.down_proj") for i in range(2)]
    (plot,) = (
        plot for plot in plots(StepReport("wanda", pruned + found, [], {})) if plot.title == "Sparsity"
    )
    assert plot.series == [Series("mlp.up_proj", [(0, 0.1), (1, 1.1)])]


@given(FINITE, FINITE)
def test_ticks_are_even_and_enclose_the_values(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    found = ticks(low, high)
    slack = 1e-9 * max(abs(low), abs(high), 1e-9)
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= 9
    steps = [after - before for before, after in pairwise(found)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-3)


@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=20), st.booleans())
def test_every_point_lies_within_the_axes(points: list[tuple[float, float]], from_zero: bool) -> None:
    root = ElementTree.fromstring(svg(Plot("<t>", "x", "y", [Series("a & b", sorted(points))], from_zero)))
    circles = root.findall("circle")
    assert len(circles) == len(points)
    for circle in circles:
        assert 63.9 <= float(circle.attrib["cx"]) <= 550.1
        assert 33.9 <= float(circle.attrib["cy"]) <= 256.1
