"""What was measured, as rows, and the tables made of them: markdown for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastserve_kernels.bench.statistics import Samples, geometric_mean
from fastserve_kernels.gpu.operator import Cost

COLUMNS = ("operator", "model", "part", "shape", "us", "spread", "GB/s", "TFLOP/s", "% bandwidth", "% matmul")


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at most, measured in the same run."""

    bytes_per_second: float
    """The bandwidth on a GPU of a large copy, reads and writes together; on a CPU of reading."""
    flops_per_second: float
    """The rate of a large bfloat16 matrix product of random data."""


@dataclass(frozen=True)
class Row:
    """An operator at a shape."""

    name: str
    """The operator, or the format of the weight."""
    model: str
    part: str
    """The linear layer, or ""."""
    shape: Mapping[str, int]
    microseconds: float
    """Median of the repetitions."""
    spread: float
    """Half the distance between the 10th and the 90th percentile, relative to the median."""
    gigabytes_per_second: float
    teraflops: float
    of_bandwidth: float
    """Share of the bandwidth, on a CPU of that between the repetitions."""
    of_matmul: float
    """Share of the matrix products' rate in `Ceilings`."""
    faster_than: Mapping[str, float]
    """By contestant: its time divided by ours, the median over the repetitions."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Contestants that could not be measured, and why."""

    @property
    def rows(self) -> int:
        """Tokens of the step."""
        return self.shape.get("m", self.shape.get("tokens", self.shape.get("batch", 1)))


def row(
    name: str,
    place: tuple[str, str],
    shape: Mapping[str, int],
    cost: Cost,
    ours: Samples,
    others: Mapping[str, Samples],
    ceilings: Ceilings,
    missing: Mapping[str, str] | None = None,
) -> Row:
    """The row of what took `ours`; place is (model, part)."""
    bandwidth, rate = cost.bytes / ours.median, cost.flops / ours.median
    return Row(
        name,
        *place,
        shape,
        ours.median * 1e6,
        ours.spread,
        bandwidth / 1e9,
        rate / 1e12,
        bandwidth / ceilings.bytes_per_second,
        rate / ceilings.flops_per_second,
        {other: ours.times_faster_than(samples) for other, samples in others.items()},
        missing or {},
    )


def summary(rows: Sequence[Row]) -> dict[tuple[str, str, int], dict[str, float]]:
    """By (name, model, tokens): the geometric mean over a model's linears of the ratio to each contestant.

    A contestant that lacks one of the linears is left out: its mean would be over others than ours.
    """
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for one in rows:
        groups.setdefault((one.name, one.model, one.rows), []).append(one)
    return {
        key: {
            other: geometric_mean(one.faster_than[other] for one in group)
            for other in group[0].faster_than
            if all(other in one.faster_than for one in group)
        }
        for key, group in groups.items()
    }


@dataclass(frozen=True)
class Report:
    """A run of the benchmark."""

    environment: Mapping[str, str]
    """Device, versions, date."""
    ceilings: Ceilings
    rows: Sequence[Row]

    def markdown(self) -> str:
        """The report as Markdown: environment, a summary by model, all rows, what was not measured."""
        contestants = list(dict.fromkeys(other for one in self.rows for other in one.faster_than))
        head = [
            *(f"{name}: {value}  " for name, value in self.environment.items()),
            f"bandwidth: {self.ceilings.bytes_per_second / 1e9:.1f} GB/s  ",
            f"bf16 matrix products: {self.ceilings.flops_per_second / 1e12:.2f} TFLOP/s",
            "",
            "x NAME: how many times faster than NAME; here the geometric mean over a model's linears.",
            "",
        ]
        means = summary(self.rows)
        overview = table(
            ("operator", "model", "tokens", *(f"x {other}" for other in contestants)),
            (
                (*map(str, key), *(_ratio(ratios.get(other)) for other in contestants))
                for key, ratios in means.items()
            ),
        )
        details = table(
            (*COLUMNS, *(f"x {other}" for other in contestants)),
            (_cells(one, contestants) for one in self.rows),
        )
        reasons = dict.fromkeys(
            f"- {name}, {one.name}: {why}" for one in self.rows for name, why in one.missing.items()
        )
        absent = ["", "Not measured:", "", *reasons] if reasons else []
        return "\n".join([*head, *overview, "", *details, *absent]) + "\n"

    def json(self) -> str:
        """The report as JSON: environment, ceilings and rows."""
        return json.dumps(
            {
                "environment": dict(self.environment),
                "ceilings": asdict(self.ceilings),
                "rows": [asdict(one) for one in self.rows],
            },
            indent=1,
        )

    def write(self, stem: Path) -> list[Path]:
        """STEM.md and STEM.json."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        paths = [stem.with_name(stem.name + suffix) for suffix in (".md", ".json")]
        for path, text in zip(paths, (self.markdown(), self.json()), strict=True):
            path.write_text(text)
        return paths


def table(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(line) + " |" for line in cells]


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _cells(one: Row, contestants: Sequence[str]) -> tuple[str, ...]:
    return (
        one.name,
        one.model,
        one.part,
        " ".join(f"{name}={size}" for name, size in one.shape.items()),
        f"{one.microseconds:.2f}",
        f"{one.spread:.1%}",
        f"{one.gigabytes_per_second:.1f}",
        f"{one.teraflops:.2f}",
        f"{one.of_bandwidth:.0%}",
        f"{one.of_matmul:.0%}",
        *(_ratio(one.faster_than.get(other)) for other in contestants),
    )
