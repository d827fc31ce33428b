"""The time of a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.simulation.step_time import (
    StepTimeError,
    StepTimeModel,
    StepWork,
    fit_step_time,
    prompt_pairs,
)

WORKS = [
    *(StepWork(1, prompt, 0, 0, prompt_pairs(0, prompt)) for prompt in (1, 8, 64, 256, 512)),
    *(StepWork(1, 512, 0, 0, prompt_pairs(start, 512)) for start in (512, 1024)),
    *(StepWork(4, prompt, 0, 0, prompt_pairs(0, prompt) // 4) for prompt in (64, 256)),
    *(
        StepWork(batch, 0, batch, batch * context, 0)
        for batch in (1, 4, 16, 64)
        for context in (16, 256, 1024)
    ),
    *(StepWork(batch + 1, 128, batch, batch * 100, prompt_pairs(0, 128)) for batch in (4, 16)),
]
COEFFICIENTS = [5e-3, 1e-4, 8e-4, 5e-4, 1e-6, 1e-8]


def terms_of(works: list[StepWork]) -> np.ndarray:
    return np.array([[1, *work] for work in works], dtype=float)


def model_of(coefficients: list[float]) -> StepTimeModel:
    return StepTimeModel(
        **dict(zip(StepTimeModel.TERMS, coefficients, strict=True)),
        copy_bytes_per_second=1e9,
        kv_bytes_per_token=23040,
        model="SmolLM2-135M-Instruct",
        machine="a processor, 2 cores",
        num_threads=2,
        num_steps=27,
        r_squared=0.99,
        median_relative_error=0.03,
    )


def test_the_pairs_of_chunks_add_up_to_those_of_the_prompt() -> None:
    assert prompt_pairs(0, 4) == 1 + 2 + 3 + 4
    assert prompt_pairs(0, 300) + prompt_pairs(300, 212) == prompt_pairs(0, 512)


@pytest.mark.parametrize("missing", [None, *range(6)])
def test_exact_steps_give_the_coefficients_back_also_where_one_is_zero(missing: int | None) -> None:
    truth = [0.0 if index == missing else value for index, value in enumerate(COEFFICIENTS)]
    fit = fit_step_time(WORKS, (terms_of(WORKS) @ truth).tolist())
    assert fit.coefficients == pytest.approx(truth, rel=1e-6, abs=1e-12)
    assert fit.r_squared == pytest.approx(1)
    assert fit.median_relative_error < 1e-6


@given(st.integers(0, 10**6), st.floats(0.01, 1.0))
def test_no_coefficient_is_negative_and_none_could_better_the_fit(seed: int, noise: float) -> None:
    """The conditions of Karush, Kuhn and Tucker, which hold at the optimum only."""
    random = np.random.default_rng(seed)
    measured = terms_of(WORKS) @ COEFFICIENTS * random.lognormal(0, noise, len(WORKS))
    coefficients = np.array(fit_step_time(WORKS, measured.tolist()).coefficients)
    assert (coefficients >= 0).all()
    relative = terms_of(WORKS) / measured[:, None]
    scale = relative.max(axis=0)
    gradient = relative.T @ (1 - relative @ coefficients) / scale
    assert (gradient < 1e-6).all()
    assert abs(gradient[coefficients > 0]).max() < 1e-6


def test_noise_shows_in_the_error() -> None:
    random = np.random.default_rng(0)
    exact = terms_of(WORKS) @ COEFFICIENTS
    fit = fit_step_time(WORKS, (exact * random.lognormal(0, 0.1, len(WORKS))).tolist())
    assert 0.01 < fit.median_relative_error < 0.2
    assert 0.9 < fit.r_squared < 1


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="6 terms; got 5"):
        fit_step_time(WORKS[:5], [1.0] * 5)


def test_seconds_are_the_sum_of_the_terms() -> None:
    model = model_of(COEFFICIENTS)
    work = StepWork(3, 100, 2, 700, 5050)
    assert model.seconds(*work) == pytest.approx(5e-3 + 3e-4 + 0.08 + 1e-3 + 7e-4 + 5050e-8)
    assert model.seconds(0, 0, 0, 0, 0) == 5e-3


def test_a_model_is_read_as_it_was_written(tmp_path: Path) -> None:
    model = model_of(COEFFICIENTS)
    model.save(tmp_path / "model.json")
    assert StepTimeModel.load(tmp_path / "model.json") == model


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"seconds_per_step": 0.005', '"seconds_per_step": -1', r"\$.seconds_per_step"),
        ('"num_threads": 2', '"threads": 2', "threads"),
        ('"copy_bytes_per_second"', '"seconds"', "seconds"),
        ("{", "", "model.json"),
    ],
)
def test_a_file_that_is_no_model_is_refused_by_field(
    old: str, new: str, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.json"
    model_of(COEFFICIENTS).save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(StepTimeError, match=sentence):
        StepTimeModel.load(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StepTimeError, match="nowhere"):
        StepTimeModel.load(tmp_path / "nowhere.json")
