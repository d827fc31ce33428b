"""`fastserve-kernels compile`: every kernel to machine code, without a GPU; a table of what each takes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastserve_kernels.gpu.compilation import (
    Compilation,
    Compiler,
    Usage,
    compilation,
    faults,
    shared_limit,
)
from fastserve_kernels.gpu.launch import Config
from fastserve_kernels.gpu.operator import Operator, Shape
from fastserve_kernels.gpu.registry import operators
from fastserve_kernels.gpu.tuning import all_tuned, distance

COLUMNS = ("operator", "kernel", "arch", "dtype", "registers", "stack", "shared", "of shared", "compiled for")


@dataclass(frozen=True)
class Row:
    """A compilation and what came of it."""

    operator: str
    dtype: str
    compilation: Compilation
    usage: Usage
    faults: list[str]

    def cells(self) -> tuple[str, ...]:
        """The cells of the row of the table."""
        limit = shared_limit(self.compilation.arch)
        return (
            self.operator,
            self.compilation.kernel,
            f"sm_{self.compilation.arch}",
            self.dtype,
            *(str(number) for number in (self.usage.registers, self.usage.stack, self.usage.shared)),
            f"{self.usage.shared / limit:.0%}",
            self.compilation.label,
        )


@dataclass(frozen=True)
class Arguments:
    """The arguments of `fastserve-kernels compile`."""

    arch: Sequence[int]
    dtype: Sequence[str]
    operator: Sequence[str]
    thorough: bool
    out: Sequence[Path]
    jobs: int


def run(arguments: Arguments) -> int:
    """Prints the table and writes it to the files named. Returns 1 if a kernel must not be used, else 0."""
    selected = operators(arguments.operator)
    dtypes = [getattr(torch, name) for name in arguments.dtype]
    rows = compile_operators(selected, arguments.arch, dtypes, arguments.thorough, arguments.jobs)
    print(markdown(rows))
    for path in arguments.out:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json_text(rows) if path.suffix == ".json" else markdown(rows))
    failed = [row for row in rows if row.faults]
    for row in failed:
        name = " ".join((*row.cells()[:4], row.compilation.label))
        print(f"{name}: {'; '.join(row.faults)}", file=sys.stderr)
    print(f"{len(rows)} kernels compiled, {len(failed)} at fault", file=sys.stderr)
    return 1 if failed else 0


def compile_operators(
    selected: Sequence[Operator],
    architectures: Sequence[int],
    dtypes: Sequence[torch.dtype],
    thorough: bool,
    jobs: int,
) -> list[Row]:
    """Compiles each operator for its small shapes with the config it takes untuned, and for bfloat16 with the
    tuned ones too; what would come out alike is compiled once.

    The other dtypes go the same ways through the kernels: their first shape must do, unless `thorough`.
    """
    wanted: dict[str, tuple[Operator, torch.dtype, Compilation]] = {}
    for operator in selected:
        for shape, dtype, config in _cases(operator, dtypes, thorough):
            for one in compilations(operator, shape, dtype, config, architectures):
                wanted.setdefault(one.key, (operator, dtype, one))
    with Compiler(jobs) as compiler:
        usages = compiler.usages([one for _, _, one in wanted.values()])
    return [
        Row(operator.name, name_of(dtype), one, usage, faults(one, usage, may_spill=dtype == torch.float32))
        for (operator, dtype, one), usage in zip(wanted.values(), usages, strict=True)
    ]


def _cases(
    operator: Operator, dtypes: Sequence[torch.dtype], thorough: bool
) -> Iterator[tuple[Shape, torch.dtype, Config]]:
    for dtype in operator.dtypes:
        if dtype in dtypes:
            every = thorough or dtype == torch.bfloat16
            for shape in operator.compiled_shapes if every else operator.compiled_shapes[:1]:
                yield shape, dtype, operator.candidates(shape)[0]
    if torch.bfloat16 in dtypes:
        for tuned in all_tuned().values():
            for entry in tuned.entries.get(operator.name, []):
                yield _stand_in(operator, entry.shape, entry.config), torch.bfloat16, entry.config


def _stand_in(operator: Operator, shape: Shape, config: Config) -> Shape:
    """The small shape nearest to a tuned one, if possible of those that the config is meant for."""
    return min(
        operator.compiled_shapes,
        key=lambda small: (config not in operator.candidates(small), distance(small, shape)),
    )


def compilations(
    operator: Operator, shape: Shape, dtype: torch.dtype, config: Config, architectures: Sequence[int]
) -> list[Compilation]:
    """The compilations of all launches of the operator; tensors on the CPU stand in for the GPU's."""
    inputs = operator.inputs(shape, dtype, torch.device("cpu"))
    launches = operator.plan(*inputs, config=config)
    return [compilation(launch, arch) for arch in architectures for launch in launches]


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype: float16."""
    return str(dtype).removeprefix("torch.")


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table, for people."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def json_text(rows: Sequence[Row]) -> str:
    """The rows as JSON, for programs."""
    return json.dumps(
        [
            {
                "operator": row.operator,
                "kernel": row.compilation.kernel,
                "arch": row.compilation.arch,
                "dtype": row.dtype,
                "compiled_for": row.compilation.label,
                "registers": row.usage.registers,
                "stack_bytes": row.usage.stack,
                "shared_bytes": row.usage.shared,
                "faults": row.faults,
            }
            for row in rows
        ],
        indent=1,
    )
