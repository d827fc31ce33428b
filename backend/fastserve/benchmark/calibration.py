"""Calibration: how long the engine's steps take on this machine, measured over a grid and fitted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence

import torch

from fastserve.benchmark.engine_driver import EngineDriver, StepSample
from fastserve.benchmark.machine import machine
from fastserve.checkpoints.model_files import locate
from fastserve.config import Config
from fastserve.engine.engine import Engine
from fastserve.engine.engine_loader import load_engine
from fastserve.models.kv_cache import KVCaches
from fastserve.simulation.step_time import StepTimeModel, fit_step_time

GRID_SECONDS = 100.0
"""After that no further point is begun; what needs most time comes last."""
REPEATS = 3
"""Runs of each set of prompts; the median counts."""
DECODES = 7
"""Steps of each batch that decodes; the median counts."""
PROMPTS = [
    *([length] for length in (1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512)),
    *([16] * count for count in (4, 16)),
    *([64] * count for count in (4, 8)),
    *([128] * count for count in (2, 4)),
    [2048],
]
"""Lengths of prompts that come together."""
LADDERS = {16: 64, 256: 64, 1024: 16}
"""By length of the prompts, to how many sequences a batch grows, doubling."""


def calibrate(model: str, seed: int) -> StepTimeModel:
    """Measures the engine's steps with a model, and how fast its KV blocks are copied; two minutes at most
    after the model is loaded, but for a step that takes long. Raises ModelError."""
    config, files = Config(model=model, speculative_method="none"), locate(model)
    return calibrate_engine(load_engine(config, files), config, files.checkpoint.name, seed)


def calibrate_engine(engine: Engine, config: Config, model: str, seed: int) -> StepTimeModel:
    """`calibrate`, of an engine that has these settings and nothing to do; `model`: its checkpoint's name."""
    driver = EngineDriver(engine, config, seed)
    samples: list[StepSample] = []
    end = time.monotonic() + GRID_SECONDS
    for sample in measure_grid(driver):
        samples.append(sample)
        if time.monotonic() > end:
            break
    driver.clear()
    bytes_per_token = kv_bytes_per_token(engine.runner.kv_caches)
    fit = fit_step_time([sample.work for sample in samples], [sample.seconds for sample in samples])
    return StepTimeModel(
        **dict(zip(StepTimeModel.TERMS, fit.coefficients, strict=True)),
        copy_bytes_per_second=engine.block_size * bytes_per_token / engine.scheduler.pool.host.copy_seconds,
        kv_bytes_per_token=bytes_per_token,
        model=model,
        machine=machine(),
        num_threads=torch.get_num_threads(),
        num_steps=len(samples),
        r_squared=fit.r_squared,
        median_relative_error=fit.median_relative_error,
    )


def kv_bytes_per_token(kv_caches: KVCaches) -> int:
    """Bytes of a token's keys and values in all layers."""
    return sum(tensor[0, 0].nbytes for cache in kv_caches for tensor in (cache.keys, cache.values))


def measure_grid(driver: EngineDriver) -> Iterator[StepSample]:
    """Steps of prompts, of decodes and of both together, the cheap ones first; the driver is then busy."""
    driver.add([16])
    driver.run(2)  # what is slow once is not measured
    for lengths in PROMPTS:
        yield from _measure_prompts(driver, lengths)
    for length, max_sequences in LADDERS.items():
        driver.clear()
        yield from _climb(driver, length, max_sequences)


def _measure_prompts(driver: EngineDriver, lengths: list[int]) -> Iterator[StepSample]:
    """The steps that compute prompts which come to an idle engine; none if they do not fit."""
    runs = []
    for _ in range(REPEATS):
        driver.clear()
        if not driver.add(lengths):
            return
        runs.append(list(driver.run_prompts()))
    yield from map(_median, zip(*runs, strict=True))


def _climb(driver: EngineDriver, length: int, max_sequences: int) -> Iterator[StepSample]:
    """A batch that doubles: steps in which prompts join those that decode, and then decodes alone.

    Of the prompts only the last two steps count, a full one and the rest: all before are like the full one,
    and so many of them would outweigh everything else.
    """
    while driver.num_sequences < max_sequences:
        if not driver.add([length] * max(1, driver.num_sequences)):
            return
        yield from list(driver.run_prompts())[-2:]
        yield _median(driver.run(DECODES))


def _median(samples: Sequence[StepSample]) -> StepSample:
    """Of steps alike; the work of decodes grows evenly, so that the middle one has the mean."""
    return StepSample(samples[len(samples) // 2].work, statistics.median(each.seconds for each in samples))
