"""The plots of a report as SVG images: figures of the linears by layer, and the training curve."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastserve.compression.calibration.linear_report import LinearReport
from fastserve.compression.report.report import StepReport, by_kind
from fastserve.compression.training.trainer import CurvePoint

FIGURE_INCHES = (7.5, 3.0)
_INK = "#7d8590"
"""Colour of text and axes: readable on a white page and on a dark one."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastserve",
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "font.size": 9,
}
"""Text stays text, names are no formulas, and the same plot is the same bytes."""


@dataclass(frozen=True)
class Series:
    """A line."""

    name: str
    points: Sequence[tuple[float, float]]
    """x and y, by ascending x."""


@dataclass(frozen=True)
class Plot:
    """Several lines over one pair of axes."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    """At least one, each with a point."""
    from_zero: bool = True
    """Whether the y axis includes 0."""


def plots(step: StepReport) -> list[Plot]:
    """The plots of a step: every known figure by layer, a line for each kind of linear; the training curve.

    A figure that is the same for all linears has none: the table tells it.
    """
    by_layer = [
        _by_layer(step.linears, "Output error", "relative, RMS", lambda linear: linear.output_error),
        _by_layer(step.linears, "Weight error", "relative, Frobenius", lambda linear: linear.weight_error),
        _by_layer(step.linears, "Bits per weight, scales included", "bits", lambda linear: linear.bits),
        _by_layer(step.linears, "Sparsity", "share of zeros", lambda linear: linear.sparsity),
        _by_layer(step.linears, "Rank", "rank", lambda linear: linear.rank),
    ]
    return [plot for plot in (*by_layer, _training_curve(step.curve)) if plot is not None]


def svg(plot: Plot) -> bytes:
    """The plot as an SVG document with a transparent background."""
    # Imported here: 30 MB that the steps, whose memory is measured, do without.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=FIGURE_INCHES, layout="constrained")
        axes = figure.subplots()
        for index, series in enumerate(plot.series):
            xs, ys = zip(*series.points, strict=True)
            axes.plot(xs, ys, marker=".", linewidth=1.2, gid=f"series {index}")
        axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label)
        if plot.from_zero:
            axes.update_datalim([(plot.series[0].points[0][0], 0.0)])
            axes.autoscale_view()
        axes.grid(alpha=0.3)
        names = [series.name for series in plot.series]
        figure.legend(axes.get_lines(), names, loc="outside right upper", frameon=False)
        image = io.BytesIO()
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    return image.getvalue()


def _by_layer(
    linears: list[LinearReport], title: str, label: str, value: Callable[[LinearReport], float | None]
) -> Plot | None:
    """The plot of a figure by layer; None if no value is known, or all are the same."""
    series = []
    for kind, of_kind in by_kind(linears).items():
        points = [(_layer(linear), found) for linear in of_kind if (found := value(linear)) is not None]
        if points:
            series.append(Series(kind, points))
    is_constant = len({y for line in series for _, y in line.points}) < 2
    return None if is_constant else Plot(title, "layer", label, series)


def _layer(linear: LinearReport) -> int:
    """3 for `model.layers.3.mlp.down_proj`."""
    return next(int(part) for part in linear.name.split(".") if part.isdigit())


def _training_curve(curve: list[CurvePoint]) -> Plot | None:
    if not curve:
        return None
    series = [Series("held-out text", [(point.minutes, point.held_out) for point in curve])]
    training = [(point.minutes, point.training) for point in curve if point.training is not None]
    if training:
        series.append(Series("training", training))
    return Plot("Loss", "minutes", "loss", series, from_zero=False)
