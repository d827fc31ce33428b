"""The figures of a simulation, by priority class."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from fastserve.simulation.result import SimulationResult

GOODPUT_SHARE = 0.9
"""Goodput is the highest load at which so many requests are served as the objective says."""


class Objective(Struct, frozen=True):
    """What a request is to be served within: its first token, and each one after it on average."""

    ttft_seconds: float = 1.55
    token_seconds: float = 0.15


class ClassFigures(Struct, frozen=True):
    """Of one priority class, or of all together; seconds."""

    priority: int | None
    """None: all classes."""
    requests: int
    ttft_mean: float
    ttft_p50: float
    ttft_p99: float
    completion_mean: float
    completion_p99: float
    normalized_latency_mean: float
    """Of completion time per output token."""
    tokens_per_second: float
    """Of answers, over the whole run."""
    preemptions: int
    within_objective: float
    """Share of requests."""


class RunFigures(Struct, frozen=True):
    """Of one policy at one load."""

    policy: str
    load: float
    """1.0: the rate at which `fcfs` just keeps up."""
    rate: float
    """Requests a second."""
    seconds: float
    """From the first arrival to the last end."""
    computed_over_needed: float
    """Tokens computed, to those that had to be."""
    cached_share: float
    """Of prompt tokens, found in the prefix cache."""
    utilization: float
    """Share of the time in which a replica computed."""
    classes: list[ClassFigures]
    """The most urgent first; the last one is of all together."""


def run_figures(
    result: SimulationResult, policy: str, load: float, rate: float, num_replicas: int, objective: Objective
) -> RunFigures:
    """The figures of a run."""
    everyone = np.ones(len(result.arrival), dtype=bool)
    priorities = sorted(set(result.priority.tolist()), reverse=True)
    classes = [_class_figures(result, each, result.priority == each, objective) for each in priorities]
    return RunFigures(
        policy,
        load,
        rate,
        result.seconds,
        result.computed_over_needed,
        result.totals.num_cached_tokens / int(result.num_prompt_tokens.sum()),
        result.totals.busy_seconds / (result.seconds * num_replicas),
        [*(classes if len(classes) > 1 else []), _class_figures(result, None, everyone, objective)],
    )


def _class_figures(
    result: SimulationResult, priority: int | None, chosen: np.ndarray, objective: Objective
) -> ClassFigures:
    ttft, completion = result.first_token[chosen], result.completion[chosen]
    num_output_tokens = result.num_output_tokens[chosen]
    token_seconds = (completion - ttft) / np.maximum(1, num_output_tokens - 1)
    is_good = (ttft <= objective.ttft_seconds) & (token_seconds <= objective.token_seconds)
    return ClassFigures(
        priority=priority,
        requests=int(chosen.sum()),
        ttft_mean=float(ttft.mean()),
        ttft_p50=float(np.percentile(ttft, 50)),
        ttft_p99=float(np.percentile(ttft, 99)),
        completion_mean=float(completion.mean()),
        completion_p99=float(np.percentile(completion, 99)),
        normalized_latency_mean=float((completion / num_output_tokens).mean()),
        tokens_per_second=float(num_output_tokens.sum() / result.seconds),
        preemptions=int(result.num_preemptions[chosen].sum()),
        within_objective=float(is_good.mean()),
    )


def goodput(runs: Sequence[RunFigures]) -> float | None:
    """Of one policy's runs: the highest load, between those simulated, at which enough requests are served as
    the objective says. None if that is not so at the lowest one, or still so at the highest."""
    points = sorted((run.load, run.classes[-1].within_objective) for run in runs)
    for (load, share), (next_load, next_share) in itertools.pairwise(points):
        if share >= GOODPUT_SHARE > next_share:
            return load + (share - GOODPUT_SHARE) / (share - next_share) * (next_load - load)
    return None
