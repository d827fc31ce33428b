"""`fastserve evaluate` and `fastserve compress`, on a tiny model."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import msgspec
import pytest
from tests.compression.conftest import SaveTiny

from fastserve import cli
from fastserve.commands import compress as compress_command
from fastserve.compression.errors import RecipeError
from fastserve.compression.recipe import Recipe, parse_recipe
from fastserve.compression.report.report import Report
from fastserve.corpus.windows import evaluation_text, token_windows
from fastserve.evaluation.evaluation import evaluate
from fastserve.models.model_loader import load_model

RECIPE = """
steps: [{step: gptq, bits: 8, group_size: 32}]
calibration: {samples: 4, length: 32}
evaluation: {length: 64, tokens: 256}
"""


@pytest.fixture
def model(save_byte_model: SaveTiny) -> Path:
    """A model whose tokens are bytes."""
    return save_byte_model()


def test_evaluate_prints_what_the_function_of_that_name_returns(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(model), "--quantization", "int8", "--reference", str(model), "--json"]
    assert cli.main([*words, "--length", "64", "--tokens", "256", "--device", "cpu"]) == 0
    printed = json.loads(capsys.readouterr().out)
    windows = token_windows(model, evaluation_text(), 64, 4)
    reference = load_model(str(model), "float32")
    expected = evaluate(load_model(str(model), "float32", quantization="int8"), reference, windows)
    assert printed["perplexity"] == pytest.approx(expected.perplexity)
    assert printed["kl"] == pytest.approx(expected.kl)
    assert printed["tokens"] == 4 * 63


def test_evaluate_shows_a_row_for_the_model_and_one_for_its_reference(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(model), "--reference", str(model), "--length", "64", "--tokens", "64"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "reference" in printed
    assert model.name[:12] in printed


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--length", "1"], "--length: got 1; allowed: at least 2"),
        (["--tokens", "-1"], "--tokens: got -1; allowed: at least 0"),
        (["--limit", "3"], "--limit, --include-path: only together with --tasks"),
        (["--tasks", "hellaswag", "--reference", "x"], "--tasks: not together with --reference"),
        (["--text", "/no/such/file"], "text file /no/such/file: cannot be read"),
        (["--length", "4096"], "length: got 4096; allowed for this model: at most 128"),
    ],
)
def test_evaluate_says_what_it_cannot_do(
    words: list[str], complaint: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(model), *words]) == 1
    assert complaint in capsys.readouterr().err


def test_tasks_without_lm_eval_are_refused_with_the_way_to_get_it(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "fastserve.evaluation.lm_eval_tasks", raising=False)
    assert cli.main(["evaluate", str(model), "--tasks", "hellaswag"]) == 1
    assert "--tasks: needs lm-eval (pip install 'fastserve[eval]')" in capsys.readouterr().err


def test_compress_writes_a_checkpoint_and_its_report(model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    out = tmp_path / "small"
    words = ["compress", str(model), "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(out)]
    assert cli.main([*words, "--device", "cpu"]) == 0
    report = msgspec.json.decode((out / "report.json").read_bytes(), type=Report)
    assert report.after.bytes_on_disk < report.before.bytes_on_disk / 2
    assert report.after.perplexity == pytest.approx(report.before.perplexity, rel=0.02)
    assert report.evaluated_tokens == 4 * 63
    assert report.after.tokens_per_second is not None
    assert set(report.after.tokens_per_second) == {"1", "16"}
    assert len(report.steps[0].linears) == 3 * 7
    assert "Output error" in (out / "report.html").read_text(encoding="utf-8")


def test_a_result_that_will_be_larger_is_said_before_it_is_made(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["compress", str(model), "--device", "cpu", "--evaluate", "none", "--samples", "2"]
    (tmp_path / "int4.yaml").write_text("steps: [{step: round, bits: 4}, {step: embedding, bits: 4}]")
    (tmp_path / "low_rank.yaml").write_text("steps: [{step: low_rank, error: 0.5}]")
    small = tmp_path / "small"
    monkeypatch.setattr(compress_command, "compress", lambda *_: pytest.fail("nothing was said first"))
    for recipe, said in (
        ("int4", r"Size: 0\.\d MB before, about 0\.1 MB after \(-8\d%\)\n"),
        (
            "low_rank",
            r"Size: 0\.\d MB before; how large the result will be, this recipe decides as it runs\n",
        ),
    ):
        with pytest.raises(pytest.fail.Exception):
            cli.main([*words, "--recipe", str(tmp_path / f"{recipe}.yaml"), "--out", str(small)])
        assert re.match(said, capsys.readouterr().err)
    monkeypatch.setattr(compress_command, "bytes_on_disk", lambda _: 30_000)
    with pytest.raises(pytest.fail.Exception):
        cli.main([*words, "--preset", "int8", "--out", str(small)])
    assert "the result will be LARGER" in capsys.readouterr().err


def test_compress_without_evaluation_reports_what_the_steps_did(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    out = tmp_path / "small"
    words = ["compress", str(model), "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(out)]
    assert cli.main([*words, "--device", "cpu", "--evaluate", "none"]) == 0
    report = msgspec.json.decode((out / "report.json").read_bytes(), type=Report)
    assert report.after.perplexity is None
    assert "3 x mlp.down_proj" in capsys.readouterr().out


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    compress_command.add_arguments(parser)
    return parser.parse_args([*words, "--out", "x"])


def test_the_command_line_replaces_what_the_recipe_says() -> None:
    recipe: Recipe = compress_command.recipe_of(
        parsed(
            "--preset",
            "int4",
            "--samples",
            "7",
            "--seed",
            "5",
            "--calibration",
            "a",
            "b",
            "--evaluation",
            "c",
        )
    )
    assert recipe.calibration.samples == 7
    assert recipe.calibration.files == ("a", "b")
    assert recipe.evaluation.files == ("c",)
    assert recipe.seed == 5


@pytest.mark.parametrize(
    ("extent", "said", "expected"),
    [("quick", 0, 2048), ("quick", 512, 512), ("full", 9000, 9000), ("full", 0, 0)],
)
def test_a_quick_evaluation_takes_no_more_than_the_recipe_says(
    extent: compress_command.Extent, said: int, expected: int
) -> None:
    recipe = parse_recipe({"steps": [{"step": "round"}], "evaluation": {"tokens": said}})
    assert compress_command.evaluation_of(recipe, extent).tokens == expected


def test_an_evaluation_is_quick_unless_another_is_asked_for() -> None:
    assert parsed("--preset", "int8").evaluate == "quick"
    assert parsed("--preset", "int8", "--evaluate", "full").evaluate == "full"


@pytest.mark.parametrize("words", [("--samples", "0"), ("--seed", "-1")])
def test_the_command_line_may_not_say_what_a_recipe_may_not(words: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError, match=r"--samples, --seed: Expected `int` >= "):
        compress_command.recipe_of(parsed("--preset", "int4", *words))


@pytest.mark.parametrize("words", [[], ["--preset", "int4", "--recipe", "r.yaml"], ["--preset", "tiny"]])
def test_a_recipe_or_a_preset_is_needed_and_not_both(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(*words)
