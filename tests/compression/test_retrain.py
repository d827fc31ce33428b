"""Retraining: the loss falls, patterns and ranks stay, and a kill changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.compression.conftest import make_context
from transformers import LlamaConfig

from fastserve.compression.errors import RecipeError
from fastserve.compression.sparsity_patterns import mask_of
from fastserve.compression.state.model_state import Part, SavedState, State, StateWriter
from fastserve.compression.state.source_state import SourceState
from fastserve.compression.training import trainer as training
from fastserve.compression.training.objective import Objective
from fastserve.compression.training.retrain import Retrain
from fastserve_kernels.formats import Bitmap, BlockSparse, Dense, Int4, LowRank, Sparse24, Weight

Q, GATE, UP, DOWN = "self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"


def mixed(source: State, directory: Path, gate: type[Weight] = Sparse24) -> SavedState:
    """Every layer with a linear of each format that can be trained."""
    after = StateWriter(directory)
    for index in range(source.num_layers):
        linears = {name: weight.dequantize() for name, weight in source.linears(index).items()}
        changed: Part = {
            Q: Bitmap.pack(linears[Q], density=0.5),
            GATE: gate.pack(linears[GATE]),  # type: ignore[attr-defined]
            UP: BlockSparse.pack(linears[UP], (16, 16), density=0.5),
            DOWN: LowRank.pack(linears[DOWN], 8),
        }
        after.write_layer(index, source.layer(index) | dict(changed))
    after.write_outer(source.outer())
    after.write_config(source.config)
    return SavedState(directory)


def retrain(step: Retrain, before: State, source: State, directory: Path) -> SavedState:
    context = make_context(source)
    step.run(before, StateWriter(directory), context)
    return SavedState(directory)


def losses(state: SavedState) -> list[float]:
    return [point["held_out"] for point in state.notes["losses"]]


def test_a_pruned_model_comes_nearer_to_what_it_was(source: SourceState, tmp_path: Path) -> None:
    before = mixed(source, tmp_path / "before")
    step = Retrain(steps=30, learning_rate=1e-3, next_token=0.0, hidden_states=0.0)
    after = retrain(step, before, source, tmp_path / "after")
    assert min(losses(after)) < 0.9 * losses(after)[0]


def test_hidden_states_come_nearer_to_what_they_were(source: SourceState, tmp_path: Path) -> None:
    before = mixed(source, tmp_path / "before")
    step = Retrain(steps=30, learning_rate=1e-3, next_token=0.0, distillation=0.0)
    after = retrain(step, before, source, tmp_path / "after")
    assert min(losses(after)) < 0.95 * losses(after)[0]


def test_the_next_tokens_are_learnt_without_a_teacher(source: SourceState, tmp_path: Path) -> None:
    step = Retrain(steps=30, learning_rate=3e-3, distillation=0.0, hidden_states=0.0)
    after = retrain(step, mixed(source, tmp_path / "before"), source, tmp_path / "after")
    curve = after.notes["losses"]
    assert curve[-1]["training"] < curve[1]["training"]


def test_formats_patterns_ranks_and_dtypes_stay_and_values_change(
    source: SourceState, tmp_path: Path
) -> None:
    before = mixed(source, tmp_path / "before")
    after = retrain(Retrain(steps=10, learning_rate=1e-3, next_token=0.0), before, source, tmp_path / "after")
    for index in range(source.num_layers):
        for name, weight in before.linears(index).items():
            found = after.linears(index)[name]
            assert type(found) is type(weight)
            mask, held = mask_of(weight), mask_of(found)
            if mask is not None and held is not None:
                assert torch.equal(held, mask)
            elif isinstance(weight, LowRank) and isinstance(found, LowRank):
                assert found.down.shape == weight.down.shape
                assert not torch.equal(found.down, weight.down)
                assert not torch.equal(found.up, weight.up)
            assert not torch.equal(found.dequantize(), weight.dequantize())
        for name, tensor in before.others(index).items():
            assert after.others(index)[name].dtype == tensor.dtype
            assert not torch.equal(after.others(index)[name], tensor)


def test_weights_that_were_left_out_are_zero_while_it_trains(source: SourceState, tmp_path: Path) -> None:
    before = mixed(source, tmp_path / "before")
    held = retrain(
        Retrain(steps=10, learning_rate=1e-3, next_token=0.0, weight_decay=0.1),
        before,
        source,
        tmp_path / "after",
    )
    after = held.transformers_model(torch.float32)
    for index in range(source.num_layers):
        for name in (Q, GATE, UP):
            mask = mask_of(before.linears(index)[name])
            weight = after.get_submodule(f"model.layers.{index}.{name}").weight
            assert isinstance(weight, torch.Tensor)
            assert mask is not None
            assert (weight[~mask] == 0).all()


@pytest.mark.parametrize("embeddings", [False, True])
def test_the_embedding_trains_if_asked_to(source: SourceState, tmp_path: Path, embeddings: bool) -> None:
    before = mixed(source, tmp_path / "before")
    step = Retrain(steps=10, learning_rate=1e-3, next_token=0.0, embeddings=embeddings)
    after = retrain(step, before, source, tmp_path / "after")
    name = "model.embed_tokens"
    whole, found = source.outer()[name], after.outer()[name]
    assert isinstance(whole, Dense)
    assert isinstance(found, Dense)
    assert torch.equal(whole.weight, found.weight) != embeddings


def test_a_killed_run_ends_in_the_same_bytes(
    source: SourceState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    before, step = mixed(source, tmp_path / "before"), Retrain(steps=6, learning_rate=1e-2, evaluations=2)
    whole = retrain(step, before, source, tmp_path / "whole")
    forward, calls = Objective.forward, 0

    def killing(self: Objective, windows: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return forward(self, windows)

    monkeypatch.setattr(Objective, "forward", killing)
    with pytest.raises(KeyboardInterrupt):
        retrain(step, before, source, tmp_path / "killed")
    killed = retrain(step, before, source, tmp_path / "killed")
    files = sorted(path.name for path in whole.directory.glob("*.safetensors"))
    assert len(files) == source.num_layers + 1
    for name in files:
        assert (killed.directory / name).read_bytes() == (whole.directory / name).read_bytes()
    assert losses(killed) == losses(whole)


def test_codes_cannot_be_trained(source: SourceState, tmp_path: Path) -> None:
    class PackedInt4(Int4):
        @classmethod
        def pack(cls, weight: torch.Tensor) -> Int4:  # type: ignore[override]
            return Int4.pack(weight, 32)

    before = mixed(source, tmp_path / "before", PackedInt4)
    with pytest.raises(RecipeError, match=r"mlp\.gate_proj is Int4; trained can be Dense, Bitmap"):
        retrain(Retrain(steps=1), before, source, tmp_path / "after")


@pytest.mark.parametrize("step", [Retrain(), Retrain(steps=1, minutes=1.0)])
def test_exactly_one_budget_is_needed(step: Retrain) -> None:
    with pytest.raises(RecipeError, match=r"minutes, steps: got (neither|both)"):
        step.check(LlamaConfig())


def test_a_loss_is_needed() -> None:
    step = Retrain(steps=1, next_token=0.0, distillation=0.0, hidden_states=0.0)
    with pytest.raises(RecipeError, match="next_token, distillation, hidden_states, attention: got 0"):
        step.check(LlamaConfig())
