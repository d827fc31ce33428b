"""The roofline: how near each operator comes to what memory and tensor cores allow."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fastserve_kernels.bench.report import Report


def roofline(report: Report, path: Path) -> None:
    """Draws operations per second over operations per byte: a point for each row, under the ceilings.

    Raises ValueError if matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'fastserve[bench]'")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    intensities = [one.teraflops / one.gigabytes_per_second * 1e3 for one in report.rows]
    rate, bandwidth = report.ceilings.flops_per_second, report.ceilings.bytes_per_second
    bend = rate / bandwidth
    edges = sorted({min([*intensities, bend]) / 2, bend, max([*intensities, bend]) * 2})
    axes.plot(
        edges, [min(edge * bandwidth, rate) / 1e12 for edge in edges], color="black", label="measured ceiling"
    )
    for name in dict.fromkeys(one.name for one in report.rows):
        points = [
            (x, one.teraflops) for x, one in zip(intensities, report.rows, strict=True) if one.name == name
        ]
        xs, ys = zip(*points, strict=True)
        axes.scatter(xs, ys, s=12, label=name)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    axes.set_title(report.environment.get("device", ""))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
