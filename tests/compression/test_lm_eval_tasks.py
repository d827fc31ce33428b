"""Tasks of lm-eval, on a tiny model and examples made here; run where lm-eval is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from fastserve.embedded import Model
from fastserve.evaluation.lm_eval_tasks import EvaluatedModel, run_tasks
from fastserve.models.model_loader import load_model
from fastserve.text.tokenizer import Tokenizer

SaveTiny = Callable[..., Path]
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{rest}
metric_list: [{{metric: {metric}}}]
"""


@pytest.fixture
def model(save_tiny: SaveTiny, save_byte_tokenizer: Callable[..., Path]) -> tuple[EvaluatedModel, Path]:
    """With a token for every byte."""
    directory = save_tiny(vocab_size=260)
    for file in save_byte_tokenizer().iterdir():
        if file.name != "config.json":
            (directory / file.name).write_bytes(file.read_bytes())
    tokenizer = Tokenizer(directory)
    return EvaluatedModel(
        load_model(str(directory)), tokenizer, lambda: Model.load(str(directory), dtype="float32")
    ), directory


def write_task(folder: Path, kind: str, metric: str, rest: str, docs: list[dict[str, Any]]) -> None:
    (folder / "docs.json").write_text("\n".join(map(json.dumps, docs)))
    (folder / "tiny.yaml").write_text(
        TASK.format(path=folder / "docs.json", kind=kind, metric=metric, rest=rest)
    )


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def test_likelihoods_are_those_of_the_logits(model: tuple[EvaluatedModel, Path]) -> None:
    evaluated, _ = model
    context, continuation = evaluated.tok_encode("ab"), evaluated.tok_encode("cd")
    ((score, is_greedy),) = evaluated.loglikelihood([request("ab", "cd")], disable_tqdm=True)
    (rolling,) = evaluated.loglikelihood_rolling([request("cd")])
    ((alone, _),) = evaluated.loglikelihood([request("", "cd")], disable_tqdm=True)
    assert score < 0
    assert not is_greedy
    assert rolling == pytest.approx(alone)
    assert len(context) == len(continuation) == 2


def test_a_rolling_likelihood_of_a_text_longer_than_the_model_scores_every_token(
    model: tuple[EvaluatedModel, Path],
) -> None:
    evaluated, _ = model
    (score,) = evaluated.loglikelihood_rolling([request("abcdefghij" * 30)])
    assert -300 * 30 < score < -300


def test_a_greedy_continuation_is_the_likeliest(model: tuple[EvaluatedModel, Path]) -> None:
    evaluated, _ = model
    hidden_tokens = evaluated.generate_until([request("ab", {"until": [], "max_gen_toks": 1})])
    assert len(hidden_tokens) == 1


def test_a_task_of_the_users_own_is_run(model: tuple[EvaluatedModel, Path], tmp_path: Path) -> None:
    evaluated, _ = model
    docs = [{"question": "ab", "choices": ["c", "d"], "answer": index % 2} for index in range(4)]
    write_task(tmp_path, "multiple_choice", "acc", "doc_to_choice: choices\ndoc_to_target: answer", docs)
    figures = run_tasks(evaluated, ["tiny"], include_path=str(tmp_path))
    assert figures["tiny"]["acc,none"] == 0.5


def test_an_unknown_task_is_refused(model: tuple[EvaluatedModel, Path]) -> None:
    with pytest.raises(ValueError, match="tasks: got nonsense_task; allowed"):
        run_tasks(model[0], ["nonsense_task"])
