"""Plots of simulations, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.atomic_write import write_bytes
from fastserve.simulation.figures import GOODPUT_SHARE, RunFigures
from fastserve.simulation.result import SimulationResult

FIGURE_INCHES = (7.5, 4.5)
MAX_POINTS = 2000
"""Of a line."""
LEAST_SECONDS = 1e-3
"""Where the time axes begin."""


def write_load_plots(directory: Path, load: float, results: Mapping[str, SimulationResult]) -> list[Path]:
    """The distributions of TTFT and completion time, and the queue over time, at one load; a line for each
    policy. Returns the files. Raises WriteError."""
    names = {
        "ttft": lambda axes, policy, result: _distribution(axes, policy, result.first_token),
        "completion": lambda axes, policy, result: _distribution(axes, policy, result.completion),
        "queue": _queue,
    }
    labels = {
        "ttft": ("time to first token, s", "share of requests", f"Time to first token at load {load:g}"),
        "completion": ("completion time, s", "share of requests", f"Completion time at load {load:g}"),
        "queue": ("time, s", "requests and preempted sequences", f"The queue at load {load:g}"),
    }
    written = []
    for name, draw in names.items():
        figure, axes = _axes(*labels[name])
        for policy, result in results.items():
            draw(axes, policy, result)
        written.append(_save(figure, axes, directory / f"{name}_{load:g}.png"))
    return written


def write_goodput_plot(directory: Path, runs: Sequence[RunFigures]) -> Path:
    """The share of requests that are served as the objective says, against load. Raises WriteError."""
    figure, axes = _axes("load", "share within the objective", "Goodput")
    for policy in dict.fromkeys(run.policy for run in runs):
        points = sorted((run.load, run.classes[-1].within_objective) for run in runs if run.policy == policy)
        axes.plot(*zip(*points, strict=True), marker="o", label=policy)
    axes.axhline(GOODPUT_SHARE, linestyle=":", color="grey")
    axes.set_ylim(0, 1.02)
    return _save(figure, axes, directory / "goodput.png")


def _distribution(axes: Any, policy: str, seconds: np.ndarray) -> None:
    shares = np.linspace(0, 1, min(MAX_POINTS, len(seconds)))
    axes.plot(np.maximum(np.quantile(seconds, shares), LEAST_SECONDS), shares, label=policy)
    axes.set_xscale("log")


def _queue(axes: Any, policy: str, result: SimulationResult) -> None:
    time, waiting, _ = result.queue[:: max(1, len(result.queue) // MAX_POINTS)].T
    axes.plot(time, waiting, label=policy)


def _axes(x_label: str, y_label: str, title: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # takes half a second to import, and only --out needs it

    figure = Figure(figsize=FIGURE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> Path:
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())
    return path
