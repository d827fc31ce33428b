"""`fastserve-kernels bench`: the operators of this machine's device, a whole decode step on a GPU, or the
all-reduce of ranks on CPUs."""

from __future__ import annotations

import datetime
import itertools
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastserve_kernels.bench import all_reduce, cpu
from fastserve_kernels.bench.plot import roofline
from fastserve_kernels.bench.report import Ceilings, Report, Row
from fastserve_kernels.bench.shapes import ROWS, cases, model_named
from fastserve_kernels.gpu.device import the_gpu

CPU_SHAPES = ("smollm2", "large")
GPU_SHAPES = ("llama-3-8b", "llama-3-70b/8", "smollm2")


@dataclass(frozen=True)
class Arguments:
    """The arguments of `fastserve-kernels bench`; what is empty has a default that depends on the device."""

    what: str
    """operators, decode-step or all-reduce."""
    device: str
    """cpu, cuda, or empty: a GPU if there is one."""
    operator: Sequence[str]
    shapes: Sequence[str]
    m: Sequence[int]
    json: bool
    plot: bool
    out: Path | None
    vllm_library: Path | None
    budget_seconds: float


def run(arguments: Arguments) -> int:
    """Prints the report, and writes it row by row to the files named. Returns 1 if a case failed, else 0.

    Raises ValueError for what is not known, or needs a GPU where there is none.
    """
    if arguments.what == "all-reduce":
        print(all_reduce.report(list(all_reduce.measured(arguments.m or all_reduce.ROWS)), arguments.json))
        return 0
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.plot and arguments.out is None:
        raise ValueError("--plot needs --out, whose name the picture takes")
    failures: list[str] = []
    with torch.inference_mode():
        on_gpu = device == "cuda"
        machine, rows = _measured_on_gpu(arguments, failures) if on_gpu else _measured_on_cpu(arguments)
        report = collect(rows, Report(_environment(device), machine, []), arguments)
    if arguments.plot and arguments.out is not None:
        roofline(report, arguments.out.with_name(arguments.out.name + ".png"))
    print(report.json() if arguments.json else report.markdown())
    print(*failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


def _measured_on_cpu(arguments: Arguments) -> tuple[Ceilings, Iterator[Row]]:
    if arguments.what == "decode-step":
        the_gpu()
    if arguments.vllm_library is not None:
        raise ValueError("--vllm-library: its operators run on a GPU only")
    names, sizes = cpu.chosen(arguments.operator), cpu.parts(arguments.shapes or CPU_SHAPES)
    machine = cpu.ceilings()
    return machine, cpu.measured(names, sizes, arguments.m or cpu.ROWS, machine)


def _measured_on_gpu(arguments: Arguments, failures: list[str]) -> tuple[Ceilings, Iterator[Row]]:
    from fastserve_kernels.bench import decode_step, gpu, graphs, peers
    from fastserve_kernels.gpu.registry import operators

    device = the_gpu()
    if arguments.vllm_library is not None:
        peers.load_vllm(arguments.vllm_library)
    shapes = arguments.shapes or (GPU_SHAPES if arguments.what == "operators" else GPU_SHAPES[:1])
    models = {name: model_named(name) for name in shapes}
    wanted = cases(operators(arguments.operator), shapes, arguments.m or ROWS)
    machine = graphs.ceilings(device)
    if arguments.what == "operators":
        return machine, gpu.measured(wanted, device, machine, failures)
    steps = (decode_step.measured(name, model, device, machine) for name, model in models.items())
    return machine, itertools.chain.from_iterable(steps)


def collect(rows: Iterable[Row], report: Report, arguments: Arguments) -> Report:
    """The report with the rows, on disk after each; what the budget leaves out is said."""
    end = time.monotonic() + arguments.budget_seconds
    for row in rows:
        report = Report(report.environment, report.ceilings, [*report.rows, row])
        if time.monotonic() > end:
            note = {"incomplete": f"stopped after {arguments.budget_seconds:.0f} s"}
            report = Report({**report.environment, **note}, report.ceilings, report.rows)
        if arguments.out is not None:
            report.write(arguments.out)
        if time.monotonic() > end:
            break
    return report


def _environment(device: str) -> dict[str, str]:
    if device == "cuda":
        machine = {"device": torch.cuda.get_device_name()}
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
        machine = {"device": name, "load average before": f"{os.getloadavg()[0]:.1f}"}
    return {
        **machine,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    """The processor's name, as Linux calls it; elsewhere its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
