"""The report as one page: tables and plots, nothing fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

import msgspec

from fastserve.atomic_write import write_bytes
from fastserve.compression.calibration.linear_report import LinearReport
from fastserve.compression.report.report import Report, StepReport, by_kind, whole_rows
from fastserve.compression.report.svg_plot import Plot, Series, svg
from fastserve.compression.training.trainer import Point

FILE = "report.html"
_STYLE = """
:root { color-scheme: light dark; --text: #1a1c20; --page: #fff; --faint: #5f6773; --rule: #d9dde3;
  --series-0: #1f6fd0; --series-1: #c2510c; --series-2: #1a8a4c; --series-3: #a3359f;
  --series-4: #8a6d00; --series-5: #0b8a99; --series-6: #c0263c; --series-7: #5f6773; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --page: #15171a; --faint: #9aa3af; --rule: #343a43;
    --series-0: #6aaeff; --series-1: #ff9b57; --series-2: #5fd08d; --series-3: #e08bdd;
    --series-4: #e0c04a; --series-5: #4fd0df; --series-6: #ff7d8c; --series-7: #9aa3af; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
p, summary { color: var(--faint); }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--rule); text-align: right; }
th:first-child, td:first-child { text-align: left; }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--rule); }
svg { width: 100%; max-width: 720px; display: block; margin: 1rem 0; }
svg text { fill: var(--text); font: 12px system-ui, sans-serif; }
svg text.title { font-size: 14px; font-weight: 600; }
svg text.middle { text-anchor: middle; } svg text.end { text-anchor: end; }
svg .grid { stroke: var(--rule); }
"""


def write_page(report: Report, directory: Path) -> None:
    """Writes `report.html`."""
    write_bytes(directory / FILE, page(report).encode())


def page(report: Report) -> str:
    """A whole HTML document."""
    name = escape(Path(report.result).name)
    versions = ", ".join(f"{package} {number}" for package, number in report.versions.items())
    evaluated = f" Evaluated on {report.evaluated_tokens} tokens." if report.evaluated_tokens else ""
    body = [
        f"<h1>{name}</h1>",
        f"<p>Made from {escape(report.model)} in {report.seconds:.0f} s, {escape(report.date)}, on "
        f"{escape(report.machine)}; {escape(versions)}.{evaluated}</p>",
        _table(("", "before", "after", "change"), whole_rows(report)),
        "<h2>Recipe</h2>",
        f"<pre>{escape(msgspec.yaml.encode(report.recipe).decode())}</pre>",
        *(part for number, step in enumerate(report.steps, start=1) for part in _step(number, step)),
    ]
    head = f'<meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>'
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            f"<head>{head}</head>",
            "<body>",
            *body,
            "</body>",
            "</html>\n",
        ]
    )


def _step(number: int, step: StepReport) -> list[str]:
    """What a step has to show: plots, its notes, a table of its linears."""
    parts = [f"<h2>Step {number}: {escape(step.step)}</h2>", *map(svg, plots(step))]
    if step.notes:
        notes = msgspec.json.format(msgspec.json.encode(step.notes), indent=1).decode()
        parts.append(f"<details><summary>Notes</summary><pre>{escape(notes)}</pre></details>")
    if step.linears:
        head = ("linear", "format", "bits", "sparsity", "rank", "weight error", "output error")
        table = _table(head, map(_cells, step.linears))
        parts.append(f"<details><summary>All {len(step.linears)} linears</summary>{table}</details>")
    return parts


def plots(step: StepReport) -> list[Plot]:
    """By layer, a line for each kind of linear, for whatever is known; and the curve of training."""
    by_layer = [
        _by_layer(step.linears, "Output error", "relative, RMS", lambda linear: linear.output_error),
        _by_layer(step.linears, "Weight error", "relative, Frobenius", lambda linear: linear.weight_error),
        _by_layer(step.linears, "Bits per weight, scales included", "bits", lambda linear: linear.bits),
        _by_layer(step.linears, "Sparsity", "share of zeros", lambda linear: linear.sparsity),
        _by_layer(step.linears, "Rank", "rank", lambda linear: linear.rank),
    ]
    return [plot for plot in (*by_layer, _curve(step.curve)) if plot is not None]


def _by_layer(
    linears: list[LinearReport], title: str, label: str, value: Callable[[LinearReport], float | None]
) -> Plot | None:
    """None if nothing is known, or the number is the same everywhere: the table tells that."""
    series = []
    for kind, of_kind in by_kind(linears).items():
        points = [(_layer(linear), found) for linear in of_kind if (found := value(linear)) is not None]
        if points:
            series.append(Series(kind, points))
    is_constant = len({y for line in series for _, y in line.points}) < 2
    return None if is_constant else Plot(title, "layer", label, series)


def _layer(linear: LinearReport) -> int:
    """3 of `model.layers.3.mlp.down_proj`."""
    return next(int(part) for part in linear.name.split(".") if part.isdigit())


def _curve(curve: list[Point]) -> Plot | None:
    if not curve:
        return None
    series = [Series("held-out text", [(point.minutes, point.held_out) for point in curve])]
    training = [(point.minutes, point.training) for point in curve if point.training is not None]
    if training:
        series.append(Series("training", training))
    return Plot("Loss", "minutes", "loss", series, from_zero=False)


def _cells(linear: LinearReport) -> Sequence[str]:
    return (
        linear.name,
        linear.format,
        f"{linear.bits:.3f}",
        "" if linear.sparsity is None else f"{linear.sparsity:.2%}",
        "" if linear.rank is None else str(linear.rank),
        "" if linear.weight_error is None else f"{linear.weight_error:.5f}",
        "" if linear.output_error is None else f"{linear.output_error:.5f}",
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_row("th", head), *(_row("td", row) for row in rows)]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
