"""`fastserve-kernels tune`: the best config of each shape on this machine's GPU, into tuned/<gpu>.json."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastserve_kernels.bench.calls import on_each
from fastserve_kernels.bench.graphs import Graph, capture, copied, copies_needed, measure
from fastserve_kernels.bench.shapes import Case, cases
from fastserve_kernels.gpu.compilation import Compiler, compilation, faults
from fastserve_kernels.gpu.device import arch_of, the_gpu
from fastserve_kernels.gpu.launch import Config, launch_all
from fastserve_kernels.gpu.operator import Operator
from fastserve_kernels.gpu.registry import operators
from fastserve_kernels.gpu.tuning import DIRECTORY, Entry, TunedConfigs, file_name, load, save

DTYPE = torch.bfloat16
TOLERANCE = 1e-2
"""Relative RMS error against the reference: the rounding of bfloat16 to and fro stays below half of it."""
ROUNDS = ((3, 12), (9, 4), (25, 1))
"""Successive halving: repetitions of each config that is left, and how many configs are left after them."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of `fastserve-kernels tune`."""

    operator: Sequence[str]
    shapes: Sequence[str]
    m: Sequence[int]
    missing: bool
    """Only the shapes that have no entry yet."""
    budget_seconds: float
    jobs: int
    directory: Path = DIRECTORY


def run(arguments: Arguments) -> int:
    """Tunes case by case, the file up to date after each; when the budget is spent, says what is left.

    Returns 1 if a case failed, or a config gave a wrong result, which is a fault of the kernel, else 0.
    Raises ValueError without a GPU.
    """
    device = the_gpu()
    path = arguments.directory / file_name(torch.cuda.get_device_name(device))
    tuned = load(path) if path.exists() else TunedConfigs(torch.cuda.get_device_name(device), {})
    wanted = cases(operators(arguments.operator), arguments.shapes, arguments.m)
    if arguments.missing:
        wanted = [case for case in wanted if not tuned.has(case.operator.name, case.shape)]
    end = time.monotonic() + arguments.budget_seconds
    faulty = False
    with Compiler(arguments.jobs) as compiler, torch.inference_mode():
        for done, case in enumerate(wanted):
            if time.monotonic() > end:
                print(f"the budget is spent: {len(wanted) - done} of {len(wanted)} shapes are not tuned")
                break
            try:
                outcome = tune(case, device, compiler)
            except Exception as error:  # the other cases may do
                print(f"{case.name} {case.label}: failed: {type(error).__name__}: {error}", flush=True)
                faulty = True
                continue
            print(outcome.line(), flush=True)
            faulty = faulty or bool(outcome.wrong)
            if outcome.entry is not None:
                tuned.put(case.operator.name, outcome.entry)
                save(tuned, path)
    print(path, file=sys.stderr)
    return int(faulty)


@dataclass(frozen=True)
class Outcome:
    """What came of tuning a case."""

    case: Case
    entry: Entry | None
    """None: no config may be used."""
    default_microseconds: float
    pruned: int
    wrong: list[Config]

    def line(self) -> str:
        """The outcome in a line for people."""
        name = f"{self.case.operator.name} {self.case.label}"
        rejected = f"{self.pruned} pruned, {len(self.wrong)} wrong"
        if self.entry is None:
            return f"{name}: no config may be used ({rejected})"
        config = " ".join(f"{key}={value}" for key, value in self.entry.config.constants.items())
        rate = self.case.operator.cost(self.case.shape, DTYPE).bytes / self.entry.microseconds / 1e3
        return (
            f"{name}: {self.entry.microseconds:.2f} us, {rate:.0f} GB/s, "
            f"{self.default_microseconds / self.entry.microseconds:.2f}x untuned: {config} "
            f"warps={self.entry.config.num_warps} stages={self.entry.config.num_stages} ({rejected})"
        )


def tune(case: Case, device: torch.device, compiler: Compiler) -> Outcome:
    """Prunes what does not fit, drops what is wrong, and times the rest in rounds."""
    operator = case.operator
    inputs = operator.inputs(case.shape, DTYPE, device)
    candidates = operator.candidates(case.shape)
    fitting = that_fit(operator, candidates, inputs, compiler, arch_of(device))
    right, wrong = that_are_right(operator, fitting, inputs)
    count = copies_needed(operator.cost(case.shape, DTYPE).bytes, device) if case.cold else 1
    sets = copied(inputs, count)
    pruned = len(candidates) - len(fitting)
    if not right:
        return Outcome(case, None, float("nan"), pruned, wrong)
    best, times = fastest({index: _graph(operator, config, sets) for index, config in enumerate(right)})
    default = times[0] if right[0] == candidates[0] else float("nan")
    entry = Entry(case.shape, right[best], times[best], datetime.date.today().isoformat())
    return Outcome(case, entry, default, pruned, wrong)


def fastest(graphs: Mapping[int, Graph]) -> tuple[int, dict[int, float]]:
    """By successive halving: the best one, and the microseconds of each when it was last measured."""
    times: dict[int, float] = {}
    left = list(graphs)
    for repetitions, survivors in ROUNDS:
        samples = measure({str(index): graphs[index] for index in left}, repetitions)
        times.update({index: samples[str(index)].median * 1e6 for index in left})
        left = sorted(left, key=times.__getitem__)[:survivors]
    return left[0], times


def that_fit(
    operator: Operator, candidates: Sequence[Config], inputs: Sequence[Any], compiler: Compiler, arch: int
) -> list[Config]:
    """The configs that compile, fit the GPU and spill nothing."""
    by_config = [
        [compilation(launch, arch) for launch in operator.plan(*inputs, config=config)]
        for config in candidates
    ]
    compiler.usages([one for compilations in by_config for one in compilations])  # all at once, in parallel
    return [
        config
        for config, compilations in zip(candidates, by_config, strict=True)
        if not any(
            faults(one, usage, may_spill=False)
            for one, usage in zip(compilations, compiler.usages(compilations), strict=True)
        )
    ]


def that_are_right(
    operator: Operator, configs: Sequence[Config], inputs: Sequence[Any]
) -> tuple[list[Config], list[Config]]:
    """(right, wrong), each config run once on a poisoned output."""
    output: Tensor = inputs[-1]
    right: list[Config] = []
    wrong: list[Config] = []
    expected: Tensor | None = None
    if operator.reference is not None:
        poison(output)
        expected = operator.reference(*inputs)
    for config in configs:
        poison(output)
        launch_all(operator.plan(*inputs, config=config))
        if expected is None:
            expected = output.clone()
        (right if relative_error(output, expected) <= TOLERANCE else wrong).append(config)
    return right, wrong


def poison(output: Tensor) -> None:
    """Fills it with what no kernel writes, so that what is left unwritten is seen."""
    output.fill_(float("nan") if output.is_floating_point() else -1)


def relative_error(came: Tensor, wanted: Tensor) -> float:
    """RMS of the difference, relative to that of what is wanted; NaN in both is no difference."""
    came, wanted = came.double(), wanted.double()
    both = came.isnan() & wanted.isnan()
    difference = (came - wanted).masked_fill(both, 0).norm()
    error = float(difference / wanted.masked_fill(both, 0).norm().clamp(min=1e-30))
    return float("inf") if error != error else error


def _graph(operator: Operator, config: Config, sets: Sequence[Sequence[Any]]) -> Graph:
    """The operator on each set of inputs in turn."""
    plans = [operator.plan(*inputs, config=config) for inputs in sets]
    return capture(on_each(launch_all, plans))
