"""The training loop: budgets, early stop, the order of the text, and going on after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from torch import Tensor, nn

from fastserve.compression.state.model_state import DONE, StateWriter
from fastserve.compression.training import trainer as training
from fastserve.compression.training.retrain import Retrain
from fastserve.compression.training.trainer import BEST, CHECKPOINT, CurvePoint, Trainer, window_order

TEXT = torch.arange(20).view(10, 2)
QUIET = Progress(disable=True)


class Killed(Exception):
    pass


def train(
    directory: Path, loss: Callable[[Tensor, Tensor], Tensor], plan: Retrain
) -> tuple[Tensor, list[CurvePoint]]:
    """Trains one vector to a loss of it and of windows; returns what it became, and the curve."""
    vector = nn.Parameter(torch.ones(3))
    directory.mkdir(exist_ok=True)
    run = Trainer(plan, {"vector": vector}, lambda windows: loss(vector, windows), directory, seed=0)
    return vector.detach(), run.run(TEXT, TEXT[:2], QUIET)


def shrink(vector: Tensor, windows: Tensor) -> Tensor:
    """Every window pulls at the vector differently."""
    return ((vector - 1 / (2 + windows.float().mean())) ** 2).sum()


def test_the_loss_falls_and_the_curve_says_how(tmp_path: Path) -> None:
    _, curve = train(tmp_path, shrink, Retrain(steps=20, batch=4, learning_rate=0.05, evaluations=4))
    assert [point.step for point in curve] == [0, 5, 10, 15, 20]
    assert [point.tokens for point in curve] == [0, 40, 80, 120, 160]
    assert curve[0].training is None
    losses = [point.held_out for point in curve]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("killed_at", [3, 7, 8, 19])
def test_a_run_killed_at_any_step_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    plan = Retrain(steps=20, learning_rate=0.05, evaluations=4)
    expected, curve = train(tmp_path / "whole", shrink, plan)
    calls = 0

    def killing(vector: Tensor, windows: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == killed_at:
            raise Killed
        return shrink(vector, windows)

    with pytest.raises(Killed):
        train(tmp_path / "killed", killing, plan)
    found, resumed = train(tmp_path / "killed", shrink, plan)
    assert torch.equal(found, expected)
    assert [point.held_out for point in resumed] == [point.held_out for point in curve]
    assert [point.training for point in resumed] == [point.training for point in curve]


def test_a_finished_run_that_was_killed_before_its_end_trains_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    plan = Retrain(steps=4, learning_rate=0.05)
    expected, _ = train(tmp_path, shrink, plan)

    def forbidden(vector: Tensor, windows: Tensor) -> Tensor:
        raise Killed

    found, _ = train(tmp_path, forbidden, plan)
    assert torch.equal(found, expected)


def test_a_budget_in_minutes_ends_with_it(tmp_path: Path) -> None:
    _, curve = train(tmp_path, shrink, Retrain(minutes=0.005, learning_rate=1e-3, evaluations=2))
    assert 0.005 <= curve[-1].minutes < 0.02
    assert curve[-1].step > 10


def test_training_ends_early_and_keeps_what_did_best_on_held_out_text(tmp_path: Path) -> None:
    def overfits(vector: Tensor, windows: Tensor) -> Tensor:
        """Held-out windows come one at a time, and are wanted to be what they were."""
        held_out = len(windows) == 1
        return ((vector - (1.0 if held_out else 0.0)) ** 2).sum()

    plan = Retrain(steps=100, learning_rate=0.01, evaluations=100, patience=5)
    vector, curve = train(tmp_path, overfits, plan)
    assert len(curve) == 1 + 5
    assert torch.equal(vector, torch.ones(3))


def test_each_window_is_taken_once_in_each_epoch() -> None:
    places = torch.cat([window_order(step, batch=4, samples=10, seed=0) for step in range(5)])
    assert sorted(places[:10].tolist()) == list(range(10))
    assert sorted(places[10:].tolist()) == list(range(10))
    assert places[:10].tolist() != places[10:].tolist()


def test_the_order_depends_on_the_seed() -> None:
    assert window_order(0, 10, 10, seed=0).tolist() != window_order(0, 10, 10, seed=1).tolist()


def test_a_large_batch_goes_through_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MICRO_TOKENS", 4)
    plan = Retrain(steps=5, learning_rate=0.05, batch=5)
    sizes = []

    def noting(vector: Tensor, windows: Tensor) -> Tensor:
        sizes.append(len(windows))
        return (vector * windows.float().mean()).sum().square()

    train(tmp_path / "parts", noting, plan)
    assert {1, 2} == set(sizes)


def test_masked_gradients_change_nothing(tmp_path: Path) -> None:
    vector = nn.Parameter(torch.tensor([1.0, 0.0, 1.0]))

    def mask() -> None:
        assert vector.grad is not None
        vector.grad[1] = 0

    plan = Retrain(steps=5, learning_rate=0.1, weight_decay=0.1)
    loss: Callable[[Tensor], Tensor] = lambda _: ((vector - 5) ** 2).sum()  # noqa: E731
    Trainer(plan, {"vector": vector}, loss, tmp_path, 0, mask).run(TEXT, TEXT[:1], QUIET)
    assert vector[1] == 0
    assert (vector[[0, 2]] > 1).all()


def test_the_rate_rises_and_then_falls_to_nothing() -> None:
    plan = Retrain(steps=1, learning_rate=2.0, warm_up=0.1)
    assert plan.rate(0.0) == pytest.approx(0.2)
    assert plan.rate(0.05) == pytest.approx(1.1)
    assert plan.rate(0.1) == pytest.approx(2)
    assert plan.rate(0.55) == pytest.approx(1)
    assert plan.rate(1.0) == pytest.approx(0)


def test_what_was_trained_to_the_end_is_not_trained_again(tmp_path: Path) -> None:
    """What comes after training may fail: to write the state takes room."""

    def fail(_: Tensor) -> Tensor:
        raise AssertionError("it trains again")

    plan, vector = Retrain(steps=4), nn.Parameter(torch.ones(3))
    curve = Trainer(plan, {"vector": vector}, lambda w: shrink(vector, w), tmp_path, 0).run(
        TEXT, TEXT[:1], QUIET
    )
    fresh = nn.Parameter(torch.ones(3))
    assert Trainer(plan, {"vector": fresh}, fail, tmp_path, 0).run(TEXT, TEXT[:1], QUIET) == curve
    assert torch.equal(fresh, vector)


def test_the_checkpoints_go_when_the_state_is_whole(tmp_path: Path) -> None:
    vector = nn.Parameter(torch.ones(3))
    run = Trainer(Retrain(steps=2), {"vector": vector}, lambda w: shrink(vector, w), tmp_path, seed=0)
    run.run(TEXT, TEXT[:1], QUIET)
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, BEST}
    StateWriter(tmp_path).finish()
    assert [path.name for path in tmp_path.iterdir()] == [DONE]
