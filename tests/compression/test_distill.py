"""Distillation: students made of their teacher, features, other teachers, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.compression.conftest import RunStep, SaveTiny, make_context

from fastserve.compression.errors import RecipeError
from fastserve.compression.state.model_state import SavedState, State, StateWriter
from fastserve.compression.state.source_state import SourceState
from fastserve.compression.training.distill import Distill
from fastserve.compression.training.losses import LogitLoss
from fastserve.compression.training.objective import FeatureWeights, Objective, paired_layers
from fastserve.compression.training.student_state import StudentSizes, StudentState, evenly
from fastserve.compression.training.training_attention import use_plain_attention
from fastserve_kernels.formats import Bitmap

SMALL = StudentSizes(num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, hidden_size=32)


def losses(state: SavedState) -> list[float]:
    return [point["held_out"] for point in state.notes["losses"]]


@pytest.mark.parametrize("divergence", ["forward", "reverse", "skewed", "skewed reverse"])
def test_a_narrower_student_comes_nearer_to_its_teacher(
    source: SourceState, run_step: RunStep, divergence: str
) -> None:
    step = Distill(
        student=SMALL,
        steps=20,
        learning_rate=1e-2,
        next_token=0.0,
        hidden_states=0.0,
        divergence=divergence,  # type: ignore[arg-type]
    )
    after = run_step(step, source)
    assert min(losses(after)) < 0.9 * losses(after)[0]
    assert after.config.hidden_size == 32
    assert after.num_layers == 2
    model = after.transformers_model(torch.float32)
    assert model(torch.arange(3, 20)[None]).logits.shape == (1, 17, 128)


def test_the_student_may_be_the_model_so_far(source: SourceState, tmp_path: Path) -> None:
    before = StudentState(source, StudentSizes(num_hidden_layers=2))
    step = Distill(steps=20, learning_rate=3e-3, next_token=0.0, hidden_states=0.1, attention=0.1)
    step.run(before, StateWriter(tmp_path / "after"), make_context(source))
    after = SavedState(tmp_path / "after")
    assert after.num_layers == 2
    assert min(losses(after)) < 0.9 * losses(after)[0]


@pytest.mark.parametrize("weights", [FeatureWeights(hidden_states=1.0), FeatureWeights(attention=1.0)])
@pytest.mark.parametrize("sizes", [SMALL, StudentSizes(num_hidden_layers=2)])
def test_features_are_learnt(source: SourceState, weights: FeatureWeights, sizes: StudentSizes) -> None:
    student = StudentState(source, sizes).transformers_model(torch.float32)
    teacher = source.transformers_model(torch.float32).requires_grad_(False)
    torch.manual_seed(0)
    objective = Objective(student, teacher, LogitLoss(0.0, 0.0), weights)
    projections = list(objective.projections.parameters())
    assert bool(projections) == (weights.hidden_states > 0 and sizes is SMALL)
    optimizer = torch.optim.Adam([*student.parameters(), *projections], 3e-3)
    windows = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(20):
        loss = objective(windows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[-1] < 0.9 * found[0]


def test_a_model_beside_itself_has_no_loss(source: SourceState) -> None:
    student, teacher = (source.transformers_model(torch.float32) for _ in range(2))
    objective = Objective(student, teacher, LogitLoss(0.0, 1.0), FeatureWeights(1.0, 1.0))
    with torch.no_grad():
        assert float(objective(torch.arange(3, 35).view(2, 16))) == pytest.approx(0, abs=1e-3)


def test_the_loss_of_the_next_token_is_transformers_own(source: SourceState) -> None:
    model = source.transformers_model(torch.float32)
    windows = torch.randint(3, 128, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = Objective(model, None, LogitLoss(1.0, 0.0))(windows)
        expected = model(windows, labels=windows).loss
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=1e-2)


def test_a_student_as_large_as_its_teacher_is_the_teacher(source: SourceState) -> None:
    student = StudentState(source, StudentSizes())
    for index in range(source.num_layers):
        torch.testing.assert_close(student.dense_layer(index), source.dense_layer(index), atol=0, rtol=0)


def test_a_student_has_whole_heads_of_its_teacher(source: SourceState) -> None:
    student = StudentState(source, StudentSizes(num_attention_heads=2))
    part, whole = student.dense_layer(0), source.dense_layer(0)
    assert torch.equal(part["self_attn.q_proj.weight"], whole["self_attn.q_proj.weight"][:32])
    assert torch.equal(part["self_attn.k_proj.weight"], whole["self_attn.k_proj.weight"][:16])
    assert torch.equal(part["self_attn.o_proj.weight"], whole["self_attn.o_proj.weight"][:, :32])


def test_another_teacher_may_be_named(source: SourceState, save_tiny: SaveTiny, run_step: RunStep) -> None:
    other = save_tiny(dtype=torch.bfloat16, num_hidden_layers=4)
    step = Distill(steps=20, learning_rate=3e-3, next_token=0.0, hidden_states=0.0, teacher=str(other))
    step.check(source.config)
    found = losses(run_step(step, source))
    assert found[0] > 0.01
    assert min(found) < 0.9 * found[0]


def test_a_teacher_of_another_vocabulary_is_refused(source: SourceState, save_tiny: SaveTiny) -> None:
    other = save_tiny(dtype=torch.bfloat16, vocab_size=64)
    with pytest.raises(RecipeError, match=r"teacher: .* has a vocabulary of 64 tokens; allowed"):
        Distill(steps=1, teacher=str(other)).check(source.config)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (StudentSizes(hidden_size=65), "student.hidden_size: got 65; allowed: at most 64"),
        (StudentSizes(num_attention_heads=3), "student.num_attention_heads: got 3; allowed: multiples of 2"),
    ],
)
def test_impossible_sizes_are_refused(source: SourceState, sizes: StudentSizes, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Distill(steps=1, student=sizes).check(source.config)


def test_a_fresh_student_is_not_made_of_pruned_weights(source: SourceState, tmp_path: Path) -> None:
    after = StateWriter(tmp_path / "before")
    for index in range(source.num_layers):
        pruned = {name: Bitmap.pack(w.dequantize(), density=0.5) for name, w in source.linears(index).items()}
        after.write_layer(index, source.layer(index) | pruned)
    after.write_outer(source.outer())
    after.write_config(source.config)
    before: State = SavedState(tmp_path / "before")
    with pytest.raises(RecipeError, match=r"student: .* is Bitmap"):
        Distill(steps=1, student=SMALL).run(before, StateWriter(tmp_path / "x"), make_context(source))


def test_layers_are_paired_evenly_and_the_last_with_the_last() -> None:
    assert paired_layers(3, 6) == [1, 3, 5]
    assert paired_layers(4, 4) == [0, 1, 2, 3]


def test_what_is_kept_is_spread_evenly() -> None:
    assert evenly(9, 3).tolist() == [0, 4, 8]
    assert evenly(5, 5).tolist() == [0, 1, 2, 3, 4]


def test_the_attention_of_training_is_torchs(source: SourceState) -> None:
    model, ids = source.transformers_model(torch.float32), torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        expected = model(ids).logits
        use_plain_attention(model)
        found = model(ids, output_attentions=True)
    torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-5)
    assert len(found.attentions) == source.num_layers
    torch.testing.assert_close(found.attentions[0].sum(-1), torch.ones(2, 4, 16))
    assert (found.attentions[0].triu(1) == 0).all()
