"""The kernels on a GPU: launched with the configs that serving would take, in CUDA graphs, on cold data."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

import torch

from fastserve_kernels.bench.calls import on_each
from fastserve_kernels.bench.graphs import Graph, capture, copied, copies_needed, measure
from fastserve_kernels.bench.peers import Maker, peers_of
from fastserve_kernels.bench.report import Ceilings, Row, row
from fastserve_kernels.bench.shapes import Case, cases
from fastserve_kernels.gpu.launch import launch_all
from fastserve_kernels.gpu.operator import Shape
from fastserve_kernels.gpu.registry import operators
from fastserve_kernels.gpu.tuning import config_for

DTYPE = torch.bfloat16
REPETITIONS = 21
RIVALS = {"linear_sparse24_int4": "linear_int4"}
"""Operators of ours that must be faster than another of ours."""


def measured(
    wanted: Sequence[Case], device: torch.device, machine: Ceilings, failures: list[str]
) -> Iterator[Row]:
    """A row for each case, said on stderr too; a case that fails is added to the failures."""
    for number, case in enumerate(wanted, 1):
        place = f"{number}/{len(wanted)} {case.name} {case.label}"
        try:
            row = measured_case(case, device, machine)
        except Exception as error:  # the other cases may do
            failures.append(f"{place}: {type(error).__name__}: {error}")
            continue
        ratios = " ".join(f"{ratio:.2f}x {name}" for name, ratio in row.faster_than.items())
        print(f"{place}: {row.microseconds:.2f} us {row.of_bandwidth:.0%} {ratios}", file=sys.stderr)
        yield row


def measured_case(case: Case, device: torch.device, machine: Ceilings) -> Row:
    """The operator against its peers at one shape, by turns."""
    cost = case.operator.cost(case.shape, DTYPE)
    count = copies_needed(cost.bytes, device) if case.cold else 1
    ours = _ours(case, device, count)
    peers, missing = _peers(peers_of(case.operator.name), case.shape, count)
    if rival := RIVALS.get(case.operator.name):
        peers[f"our {rival}"] = _ours(_at_the_place_of(case, rival), device, count)
    times = measure({"": ours, **peers}, REPETITIONS)
    others = {name: times[name] for name in peers}
    return row(case.name, (case.model, case.part), case.shape, cost, times[""], others, machine, missing)


def _at_the_place_of(case: Case, rival: str) -> Case:
    """The rival at the same linear layer, with as many tokens."""
    rivals = cases(operators([rival]), [case.model], [case.shape["m"]])
    return next(other for other in rivals if other.part == case.part)


def _ours(case: Case, device: torch.device, count: int) -> Graph:
    config = config_for(case.operator, case.shape, device)
    sets = copied(case.operator.inputs(case.shape, DTYPE, device), count)
    plans = [case.operator.plan(*inputs, config=config) for inputs in sets]
    return capture(on_each(launch_all, plans))


def _peers(makers: Mapping[str, Maker], shape: Shape, count: int) -> tuple[dict[str, Graph], dict[str, str]]:
    """(what can be measured, why the rest cannot)."""
    graphs: dict[str, Graph] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        try:
            graphs[name] = capture(make(shape, count))
        except Exception as error:  # whatever a peer raises belongs in the report
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return graphs, missing
