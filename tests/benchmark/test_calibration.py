"""Steps of a real engine, measured and fitted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from fastserve.benchmark import calibration, engine_driver
from fastserve.benchmark.calibration import kv_bytes_per_token
from fastserve.benchmark.engine_driver import EngineDriver
from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import Config
from fastserve.engine.engine import Engine
from fastserve.engine.engine_loader import load_engine
from fastserve.simulation.step_time import StepWork, prompt_pairs
from fastserve.types import StepOutput


@pytest.fixture(scope="module")
def config() -> Config:
    return Config(kv_cache_bytes=1 << 26, max_num_seqs=8, speculative_method="none")


@pytest.fixture(scope="module")
def engine(config: Config, default_model: ModelFiles) -> Engine:
    return load_engine(config, default_model)


@pytest.fixture
def driver(engine: Engine, config: Config) -> Iterator[EngineDriver]:
    driver = EngineDriver(engine, config, seed=0)
    yield driver
    driver.clear()
    assert not engine.has_work


def test_the_work_of_each_step_is_known(driver: EngineDriver) -> None:
    """The driver raises for a step that computed another number of tokens."""
    assert driver.add([600, 30])
    first, second = driver.run_prompts()
    assert first.work == StepWork(1, 512, 0, 0, prompt_pairs(0, 512))
    assert second.work == StepWork(2, 88 + 30, 0, 0, prompt_pairs(512, 88) + prompt_pairs(0, 30))
    [decodes] = driver.run(1)
    assert decodes.work == StepWork(2, 0, 2, 601 + 31, 0)
    assert driver.add([5])
    [mixed] = driver.run_prompts()
    assert mixed.work == StepWork(3, 5, 2, 602 + 32, prompt_pairs(0, 5))
    assert decodes.seconds > 0


def test_what_does_not_fit_is_not_added(driver: EngineDriver, engine: Engine) -> None:
    assert not driver.add([10] * 9)
    assert not driver.add([engine.stats().kv_blocks_total * 16])
    assert not driver.add([engine.max_model_len])
    assert driver.num_sequences == 0
    assert driver.add([10] * 8)
    assert not driver.add([10])
    assert driver.num_sequences == 8


def test_another_step_than_the_drivers_is_noticed(driver: EngineDriver, engine: Engine) -> None:
    driver.add([10])
    engine.step()
    with pytest.raises(RuntimeError, match="computed 1 tokens, not 10"):
        driver.step()


def test_copying_blocks_changes_none(engine: Engine) -> None:
    caches = engine.runner.kv_caches
    before = [cache.keys.clone() for cache in caches]
    assert any(keys.any() for keys in before)
    assert 1e-7 < engine.runner.host.measure_copy_seconds() < 0.1
    assert all((keys == cache.keys).all() for keys, cache in zip(before, caches, strict=True))


def test_the_bytes_of_a_token_fill_the_cache(engine: Engine, config: Config) -> None:
    tokens = engine.stats().kv_blocks_total * config.block_size
    assert 0.99 * (1 << 26) < tokens * kv_bytes_per_token(engine.runner.kv_caches) <= 1 << 26


@pytest.fixture
def clock(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which a step takes 10 ms, and 2 ms more for each token."""
    step, now = engine.step, [0.0]

    def timed_step() -> StepOutput:
        output = step()
        now[0] += 0.010 + 0.002 * output.stats.step_tokens
        return output

    monkeypatch.setattr(engine, "step", timed_step)
    fake = SimpleNamespace(perf_counter=lambda: now[0], monotonic=time.monotonic)
    monkeypatch.setattr(engine_driver, "time", fake)


@pytest.mark.usefixtures("clock")
def test_a_grid_gives_a_model_of_what_was_measured(
    engine: Engine, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "PROMPTS", [[1], [16], [100], [16] * 4])
    monkeypatch.setattr(calibration, "LADDERS", {8: 4, 50: 2})
    model = calibration.calibrate_engine(engine, config, "a model", seed=0)
    assert model.num_steps == 4 + 2 * 3 + 2 * 2
    assert model.r_squared == pytest.approx(1)
    assert model.median_relative_error == pytest.approx(0, abs=1e-9)
    assert model.seconds(1, 0, 1, 16, 0) == pytest.approx(0.012)
    assert model.seconds(3, 200, 2, 150, prompt_pairs(0, 200)) == pytest.approx(0.010 + 0.002 * 202)
    assert model.model == "a model"
    assert "cores" in model.machine
    assert model.kv_bytes_per_token == 2 * 30 * 3 * 64 * 2  # keys and values, layers, heads, head size, bf16
    assert not engine.has_work


def test_a_grid_whose_time_is_up_ends(
    engine: Engine, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "GRID_SECONDS", -1.0)
    with pytest.raises(ValueError, match="6 terms; got 1"):
        calibration.calibrate_engine(engine, config, "a model", seed=0)
