"""The plot of a closed loop: throughput against concurrency."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastserve.atomic_write import write_bytes


def write_throughput_plot(path: Path, lines: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Draws a line for each target through its points: clients, and output tokens per second.

    The format is the path's suffix. Raises WriteError.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    ticks = sorted({clients for points in lines.values() for clients, _ in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("clients")
    axes.set_ylabel("output tokens per second")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    written = io.BytesIO()
    figure.savefig(written, format=path.suffix.removeprefix("."), dpi=144)
    write_bytes(path, written.getvalue())
