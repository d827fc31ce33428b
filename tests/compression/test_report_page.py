"""The page of plots: well formed, self-contained, and with everything that the report knows."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.atomic_write import WriteError
from fastserve.compression.calibration.linear_report import LinearReport
from fastserve.compression.report import report_page
from fastserve.compression.report.plots import Plot, Series, plots, svg
from fastserve.compression.report.report import ModelFigures, Report, StepReport
from fastserve.compression.report.report_page import page, write_page
from fastserve.compression.training.trainer import CurvePoint

SVG = "{http://www.w3.org/2000/svg}"
FINITE = st.floats(-1e9, 1e9, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-9)


def linear(layer: int, kind: str, rank: int | None = None) -> LinearReport:
    return LinearReport(
        f"model.layers.{layer}.{kind}", "Int4", 4.25, None, rank, 0.1 + layer, 0.02 * (layer + 1)
    )


@pytest.fixture
def report() -> Report:
    kinds = ("self_attn.q_proj", "mlp.down_proj")
    curve = [CurvePoint(0, 0, 0, None, 4.0), CurvePoint(9, 900, 1.5, 3.9, 3.5)]
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
            StepReport("distill", [], curve, {}),
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
        if tag not in ("meta", "img"):
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
    assert not re.search(r"<script|<link|href=|url\(|@import", text)
    images = re.findall(r'src="([^"]*)"', text)
    assert len(images) == 3
    for image in images:
        kind, _, encoded = image.partition(",")
        assert kind == "data:image/svg+xml;base64"
        references = re.findall(rb'(?:href="|url\()([^")]*)', b64decode(encoded))
        assert [found for found in references if not found.startswith(b"#")] == []


def test_a_full_disk_under_the_fonts_is_a_sentence(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(plot: Plot) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(report_page, "svg", refuse)
    with pytest.raises(WriteError, match=r"report\.html: cannot be written: No space left on device"):
        write_page(report, tmp_path)


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


@settings(deadline=None, max_examples=10)
@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=20), st.booleans())
def test_every_point_is_drawn_within_the_axes(points: list[tuple[float, float]], from_zero: bool) -> None:
    root = ElementTree.fromstring(svg(Plot("<t>", "x", "y", [Series("a & b", sorted(points))], from_zero)))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    line = next(g for g in root.iter(f"{SVG}g") if g.attrib.get("id") == "series 0")
    markers = list(line.iter(f"{SVG}use"))
    assert len(markers) == len(points)
    assert all(0 < float(m.attrib["x"]) < width and 0 < float(m.attrib["y"]) < height for m in markers)


def test_labels_are_text_and_names_are_no_formulas() -> None:
    root = ElementTree.fromstring(svg(Plot("A title", "$x$", "y", [Series("_a & <b>", [(0, 1), (1, 3)])])))
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert {"A title", "$x$", "y", "_a & <b>"} <= texts


def test_an_axis_from_zero_shows_zero() -> None:
    def labels(from_zero: bool) -> set[str | None]:
        plot = Plot("t", "x", "y", [Series("a", [(10, 100), (11, 101)])], from_zero)
        return {text.text for text in ElementTree.fromstring(svg(plot)).iter(f"{SVG}text")}

    assert "0" in labels(True)
    assert "0" not in labels(False)


def test_the_same_plot_is_the_same_bytes() -> None:
    plot = Plot("t", "x", "y", [Series("a", [(0, 1), (1, 3)])])
    assert svg(plot) == svg(plot)
