"""Calibration of a running server: how long steps take beside everything else that serving does.

Measured inside one process, steps are as fast as the engine can take them. A server's other processes share
the cores with it: on two cores its steps were seen to take a fifth longer.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from fastserve.benchmark.closed_loop import run_load
from fastserve.benchmark.job import Job, random_jobs
from fastserve.benchmark.targets import Target
from fastserve.simulation.step_time import StepTimeModel, StepWork, fit_step_time, prompt_pairs
from fastserve.workload.lengths import LogNormalLengths

STEP_TOKENS = "fastserve_step_batch_tokens"
"""The histogram whose count is that of the steps, and whose sum that of the computed tokens."""
METRICS_SECONDS = 10.0
"""In which the metrics page knows of the last step."""
CHUNK_TOKENS = 512
"""Of a prompt in one step, by the default token budget."""
SIGMA = 0.5
"""Of the logarithms of all lengths, so that prompts join those that decode."""
MAX_LENGTH = 1024


class CalibrationError(Exception):
    """The server does not say what it computed, or computed something else; the sentence says which."""


class LoadPoint(NamedTuple):
    """A closed loop; lengths are means."""

    num_clients: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_requests: int


POINTS = [
    LoadPoint(1, 32, 64, 6),
    LoadPoint(1, 512, 8, 12),
    LoadPoint(2, 64, 64, 12),
    LoadPoint(4, 32, 64, 20),
    LoadPoint(4, 256, 32, 24),
    LoadPoint(8, 64, 64, 32),
    LoadPoint(8, 512, 16, 32),
    LoadPoint(16, 16, 96, 64),
    LoadPoint(16, 128, 64, 64),
    LoadPoint(16, 256, 32, 64),
    LoadPoint(16, 512, 16, 48),
    LoadPoint(16, 640, 96, 48),
    LoadPoint(32, 96, 48, 96),
]
"""One client first: all that a step takes whatever it computes; then more of each kind of work."""


class StepTotals(NamedTuple):
    """What a server has computed since it started."""

    num_steps: int
    num_tokens: int


def read_step_totals(metrics_url: str) -> StepTotals:
    """From a server's metrics page, HOST:PORT. Raises CalibrationError, OSError if nobody answers."""
    with urllib.request.urlopen(f"http://{metrics_url}/metrics", timeout=METRICS_SECONDS) as response:
        lines = response.read().decode().splitlines()

    def total(name: str) -> int:
        values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{")]
        if not values:
            raise CalibrationError(f"{metrics_url}: no metric {name}; allowed: the metrics page of FastServe")
        return round(sum(values))

    return StepTotals(total(STEP_TOKENS + "_count"), total(STEP_TOKENS + "_sum"))


def calibrate_server(
    target: Target,
    read_totals: Callable[[], StepTotals],
    model: StepTimeModel,
    seed: int,
    points: Sequence[LoadPoint] = POINTS,
) -> StepTimeModel:
    """`model` with the step times of a server that nobody else uses; some two minutes.

    Each point gives one equation: the seconds of a closed loop are the sum of its steps'. Raises
    CalibrationError if the server computes anything else meanwhile, and what the target raises.
    """
    from fastserve.benchmark.machine import machine  # which loads torch: nothing else here needs it

    run_load(target, random_jobs(2, seed), 2)  # warm up
    work, seconds = zip(*_measure(target, read_totals, seed, points), strict=True)
    fit = fit_step_time(work, seconds)
    return replace(
        model,
        **dict(zip(StepTimeModel.TERMS, fit.coefficients, strict=True)),
        machine=f"{machine()}, through the server",
        num_steps=len(work),
        r_squared=fit.r_squared,
        median_relative_error=fit.median_relative_error,
    )


def _measure(
    target: Target, read_totals: Callable[[], StepTotals], seed: int, points: Sequence[LoadPoint]
) -> Iterator[tuple[StepWork, float]]:
    """The mean step of each point, and its seconds."""
    for number, point in enumerate(points, start=1):
        jobs = random_jobs(
            point.num_requests,
            seed + number,
            LogNormalLengths(point.num_prompt_tokens, SIGMA, 1, MAX_LENGTH),
            LogNormalLengths(point.num_output_tokens, SIGMA, 1, MAX_LENGTH),
        )
        before = read_totals()
        start = time.perf_counter()
        run_load(target, jobs, point.num_clients)
        seconds = time.perf_counter() - start
        num_steps = _steps_since(before, read_totals, _num_tokens(jobs))
        yield _mean_work(jobs, num_steps), seconds / num_steps


def _steps_since(before: StepTotals, read_totals: Callable[[], StepTotals], num_tokens: int) -> int:
    """The steps that computed so many tokens, once the metrics page knows of all of them."""
    end = time.monotonic() + METRICS_SECONDS
    while (now := read_totals()).num_tokens < before.num_tokens + num_tokens and time.monotonic() < end:
        time.sleep(0.05)  # between two polls
    computed = now.num_tokens - before.num_tokens
    if computed != num_tokens:
        raise CalibrationError(
            f"{num_tokens} tokens were asked for, and {computed} computed: somebody else uses the server, it "
            "has cached these prompts, or it speculates; allowed: a server that nobody uses, started with "
            "--speculative-method none, and another --seed each time"
        )
    return now.num_steps - before.num_steps


def _num_tokens(jobs: Sequence[Job]) -> int:
    """Prompts, and answers less the last token of each, which nothing follows."""
    return sum(len(job.prompt_token_ids) + job.max_tokens - 1 for job in jobs)


def _mean_work(jobs: Sequence[Job], num_steps: int) -> StepWork:
    """Of all steps together, divided by their number."""
    lengths = [(len(job.prompt_token_ids), job.max_tokens - 1) for job in jobs]
    num_prompt_tokens = sum(prompt for prompt, _ in lengths)
    num_decodes = sum(decodes for _, decodes in lengths)
    num_chunks = sum(-(-prompt // CHUNK_TOKENS) for prompt, _ in lengths)
    num_context = sum(decodes * prompt + decodes * (decodes + 1) // 2 for prompt, decodes in lengths)
    num_pairs = sum(prompt_pairs(0, prompt) for prompt, _ in lengths)
    totals = (num_decodes + num_chunks, num_prompt_tokens, num_decodes, num_context, num_pairs)
    return StepWork(*(total / num_steps for total in totals))  # type: ignore[arg-type]  # means are fractions
