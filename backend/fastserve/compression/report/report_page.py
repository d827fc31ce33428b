"""The report as one HTML page: tables and plots, nothing fetched from elsewhere."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined

from fastserve.atomic_write import write_bytes, write_errors
from fastserve.compression.calibration.linear_report import LinearReport
from fastserve.compression.report.plots import Plot, plots, svg
from fastserve.compression.report.report import Report, whole_rows

FILE = "report.html"
TEMPLATE = "report.html"


def write_page(report: Report, directory: Path) -> None:
    """Writes `report.html`. Raises WriteError."""
    with write_errors(directory / FILE):  # matplotlib makes a cache of fonts, which a full disk refuses
        content = page(report).encode()
    write_bytes(directory / FILE, content)


def page(report: Report) -> str:
    """The whole HTML document; plots are data URIs in it."""
    environment = Environment(
        loader=PackageLoader("fastserve.compression.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"data_uri": _data_uri, "json": _json, "linear_cells": _linear_cells}
    return environment.get_template(TEMPLATE).render(
        report=report,
        name=Path(report.result).name,
        whole_rows=whole_rows(report),
        recipe=msgspec.yaml.encode(report.recipe).decode(),
        plots=plots,
    )


def _data_uri(plot: Plot) -> str:
    return f"data:image/svg+xml;base64,{b64encode(svg(plot)).decode()}"


def _json(notes: dict[str, Any]) -> str:
    return msgspec.json.format(msgspec.json.encode(notes), indent=1).decode()


def _linear_cells(linear: LinearReport) -> Sequence[str]:
    return (
        linear.name,
        linear.format,
        f"{linear.bits:.3f}",
        "" if linear.sparsity is None else f"{linear.sparsity:.2%}",
        "" if linear.rank is None else str(linear.rank),
        "" if linear.weight_error is None else f"{linear.weight_error:.5f}",
        "" if linear.output_error is None else f"{linear.output_error:.5f}",
    )
