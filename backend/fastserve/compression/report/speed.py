"""Generation speed of models in the engine inside this process, measured in turns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import fields, is_dataclass
from itertools import islice
from pathlib import Path

from rich.progress import Progress
from torch import Tensor

from fastserve import heap
from fastserve.benchmark.closed_loop import run_load
from fastserve.benchmark.job import Job
from fastserve.benchmark.targets import InProcessTarget
from fastserve.corpus.windows import calibration_text, token_windows
from fastserve.models.causal_lm import CausalLM
from fastserve.models.decoder import Decoder

BATCHES = (1, 16)
KV_CACHE_BYTES = 64 << 20
"""Enough for the largest batch of small models, and for one sequence of a large one."""
LEAST_JOBS = WARM_UP_JOBS = 2
Speeds = dict[int, float]
"""Output tokens per second by batch size, prompts included in the time."""


def measure_speeds(
    models: Mapping[str, str],
    tokenizer: Path,
    progress: Progress,
    batches: Sequence[int] = BATCHES,
    rounds: int = 3,
    prompt_tokens: int = 32,
    output_tokens: int = 128,
) -> dict[str, Speeds]:
    """The speeds of each model, given by any name and its path: medians of `rounds` runs.

    `tokenizer`: the directory of the one that all of them have; prompts are ordinary text. The models take
    turns, so that the machine's drift falls on all of them, and only that whose turn it is is in memory.

    Raises ModelError.
    """
    runs: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in batches} for name in models}
    counts = {batch: max(LEAST_JOBS, batch) for batch in batches}
    needed = WARM_UP_JOBS + rounds * sum(counts.values())
    prompts = iter(token_windows(tokenizer, calibration_text(), prompt_tokens, needed).tolist())
    warm_up = [Job(prompt, 8) for prompt in islice(prompts, WARM_UP_JOBS)]
    task = progress.add_task("speed", total=rounds * len(models))
    for _ in range(rounds):
        # No prompt comes twice to a model: the prefix cache must not answer for the engine.
        jobs = {
            batch: [Job(prompt, output_tokens) for prompt in islice(prompts, count)]
            for batch, count in counts.items()
        }
        for name, path in models.items():
            for batch, speed in _turn(path, warm_up, jobs).items():
                runs[name][batch].append(speed)
            heap.trim()
            progress.advance(task)
    return {
        name: {batch: statistics.median(found) for batch, found in of_model.items()}
        for name, of_model in runs.items()
    }


def _turn(path: str, warm_up: list[Job], jobs: Mapping[int, list[Job]]) -> Speeds:
    """The speeds of one model, which is loaded for it, with the jobs of each batch size."""
    with closing(InProcessTarget(path, kv_cache_bytes=KV_CACHE_BYTES)) as target:
        run_load(target, warm_up, WARM_UP_JOBS)
        return {
            batch: run_load(target, of_batch, batch).tokens_per_second for batch, of_batch in jobs.items()
        }


def bytes_per_token(model: CausalLM) -> int | None:
    """Bytes of weights that a token of a lone sequence reads: all but the embedding, of which it reads a row.

    None for a model that our decoder does not run.
    """
    if not isinstance(model, Decoder):
        return None
    weights = model.weights
    # Layers may be read one at a time.
    return sum(map(_tensor_bytes, weights.layers)) + _tensor_bytes([weights.final_norm, weights.lm_head])


def _tensor_bytes(value: object) -> int:
    """Bytes of all tensors in lists, tuples and dataclasses."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(_tensor_bytes(part) for part in value)
    if is_dataclass(value):
        return sum(_tensor_bytes(getattr(value, field.name)) for field in fields(value))
    return 0
