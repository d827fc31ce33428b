"""Tasks of lm-eval (EleutherAI's language model evaluation harness), which the user has installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fastserve.embedded import Model, ModelServer
from fastserve.evaluation.evaluation import SequenceRunner, log_probabilities
from fastserve.models.causal_lm import CausalLM
from fastserve.text.tokenizer import Tokenizer

MAX_LENGTH = 2048
"""Tokens of a context and its continuation; longer ones lose their beginning."""
MAX_NEW_TOKENS = 256
"""New tokens for a task that does not say how many."""
TokenRequest = tuple[tuple[str, str], list[int], list[int]]
"""A request of lm-eval: the texts, and the tokens of the context and of its continuation."""


def run_tasks(
    model: EvaluatedModel, names: list[str], limit: int | None = None, include_path: str | None = None
) -> dict[str, dict[str, Any]]:
    """The figures of each task, and of each group of tasks, as lm-eval names them.

    `limit`: examples of each task; None: all. `include_path`: a folder with the user's own task files. Raises
    ValueError for a task that lm-eval does not know.
    """
    manager = TaskManager(include_path=include_path)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(f"tasks: got {', '.join(unknown)}; allowed: those that `lm-eval ls tasks` lists")
    results = simple_evaluate(model, tasks=names, limit=limit, task_manager=manager, log_samples=False)
    return {name: dict(figures) for name, figures in results["results"].items()}


class EvaluatedModel(TemplateLM):
    """A model as lm-eval sees one."""

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, load_engine: Callable[[], Model]) -> None:
        """`load_engine` gives the same model in an engine; only tasks that generate text ask for it."""
        super().__init__()
        self.model = model
        self._tokenizer = tokenizer
        self._load_engine = load_engine
        self._begin = tokenizer.backend.encode("").ids
        self._max_length = min(MAX_LENGTH, model.max_position)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._tokenizer.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self._begin[0] if self._begin else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The token ids of a text, begun as the tokenizer begins every text unless `add_special_tokens` is
        False."""
        ids: list[int] = self._tokenizer.backend.encode(string, add_special_tokens=False).ids
        has_begin = ids[: len(self._begin)] == self._begin
        return ids if has_begin or add_special_tokens is False else self._begin + ids

    def _loglikelihood_tokens(self, requests: list[TokenRequest], **_: Any) -> list[tuple[float, bool]]:
        sequences = SequenceRunner(self.model, self._max_length)
        return [self._score(sequences, context, continuation) for _, context, continuation in requests]

    def _score(
        self, sequences: SequenceRunner, context: list[int], continuation: list[int]
    ) -> tuple[float, bool]:
        """The log likelihood of the continuation, and whether each of its tokens is the likeliest."""
        ids = torch.tensor([*context, *continuation][-(self._max_length + 1) :])
        hidden = sequences.hidden(ids[None, :-1])[0][-len(continuation) :]
        scores = log_probabilities(self.model, hidden).cpu()
        targets = ids[-len(hidden) :, None]
        is_greedy = bool((scores.argmax(-1, keepdim=True) == targets).all())
        return float(scores.gather(-1, targets).sum()), is_greedy

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log likelihoods of whole texts, in nats."""
        sequences = SequenceRunner(self.model, self._max_length)
        return [self._rolling(sequences, request.args[0]) for request in requests]

    def _rolling(self, sequences: SequenceRunner, text: str) -> float:
        """The log likelihood of a text of any length, each token scored once."""
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text, add_special_tokens=False),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._max_length,
            context_len=1,
        )
        return sum(self._score(sequences, *make_disjoint_window(window))[0] for window in windows)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuations of contexts, up to a stop string."""
        with ModelServer(self._load_engine()) as server:
            tasks = [self._submit(server, *request.args) for request in requests]
            return [task.result() for task in tasks]

    def _submit(self, server: ModelServer, context: str, options: dict[str, Any]) -> Any:
        until = options.get("until") or []
        new = int(options.get("max_gen_toks", MAX_NEW_TOKENS))
        return server.submit(
            self.tok_encode(context)[-max(1, self._max_length - new) :],
            max_tokens=new,
            temperature=float(options.get("temperature", 0)) if options.get("do_sample") else 0.0,
            stop=[until] if isinstance(until, str) else list(until),
        )
