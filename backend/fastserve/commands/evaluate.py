"""`fastserve evaluate MODEL`: perplexity, the distance to a reference, and tasks of lm-eval."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.model_files import ModelFiles, locate
from fastserve.checkpoints.online_quantization import ACTIVATION_QUANTIZATIONS, QUANTIZATIONS
from fastserve.config import ConfigError
from fastserve.corpus.windows import TextError, evaluation_text, read_text, token_windows
from fastserve.embedded import Model
from fastserve.engine.engine_loader import choose_device
from fastserve.engine.kv_scales import choose_kv_cache
from fastserve.errors import RequestError
from fastserve.evaluation.evaluation import KVCacheFormat, Quality, evaluate
from fastserve.models.causal_lm import CausalLM
from fastserve.models.kv_cache import KV_CACHE_DTYPES
from fastserve.models.model_loader import DTYPES, load_model
from fastserve.text.tokenizer import load_tokenizer

ERRORS = (ModelError, RequestError, TextError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `fastserve evaluate`."""
    parser.add_argument(
        "model", nargs="?", default="", help="directory, GGUF file or hub name (default: the default model)"
    )
    parser.add_argument(
        "--quantization", choices=QUANTIZATIONS, default="auto", help="of the weights (default: %(default)s)"
    )
    parser.add_argument(
        "--activation-quantization",
        choices=ACTIVATION_QUANTIZATIONS,
        default="none",
        help="of what meets weights of 4 and 8 bits on a CPU; what is served is auto (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="float32",
        help="to compute in, the reference too (default: %(default)s)",
    )
    parser.add_argument(
        "--kv-cache-dtype", choices=("auto", *KV_CACHE_DTYPES), default="auto", help="(default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--reference", metavar="MODEL", help="the model to stay near to")
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help="UTF-8 (default: what comes with FastServe)"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens of a window (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=0, help="about so many, from all over the text (default: all of it)"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="of lm-eval, in place of text")
    parser.add_argument("--limit", type=int, help="examples of each task (default: all)")
    parser.add_argument("--include-path", metavar="DIR", help="task files of your own, for lm-eval")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Evaluates, prints a table or JSON, and returns the exit status. Raises ConfigError and those in
    ERRORS."""
    _check(arguments)
    files = locate(arguments.model)
    model = _load(files, arguments, arguments.quantization, arguments.activation_quantization)
    if arguments.tasks:
        figures = _run_tasks(model, files, arguments)
        _print(figures, _tasks_table(figures), arguments.json)
        return 0
    quality = _evaluate(model, files, arguments)
    _print(dataclasses.asdict(quality), quality_table(str(files.checkpoint), quality), arguments.json)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError, before anything is loaded."""
    for name, least in (("length", 2), ("tokens", 0), ("limit", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name}: got {value}; allowed: at least {least}")
    if arguments.tasks and (arguments.reference or arguments.text):
        raise ConfigError("--tasks: not together with --reference or --text, which are for perplexity")
    if not arguments.tasks and (arguments.limit or arguments.include_path):
        raise ConfigError("--limit, --include-path: only together with --tasks")


def _load(
    files: ModelFiles, arguments: argparse.Namespace, quantization: str, activation_quantization: str
) -> CausalLM:
    return load_model(
        str(files.checkpoint),
        arguments.dtype,
        choose_device(arguments.device),
        quantization=quantization,
        activation_quantization=activation_quantization,
        one_layer_at_a_time=not arguments.tasks,  # whose requests come one by one
    )


def _evaluate(model: CausalLM, files: ModelFiles, arguments: argparse.Namespace) -> Quality:
    """Raises TextError, and ModelError for windows or a reference that do not fit the model."""
    text = read_text(arguments.text) if arguments.text else evaluation_text()
    samples = max(1, arguments.tokens // arguments.length) if arguments.tokens else None
    windows = token_windows(files.tokenizer, text, arguments.length, samples)
    reference = None
    if arguments.reference is not None:
        reference = _load(locate(arguments.reference), arguments, "auto", "none")
    kv_cache: KVCacheFormat = choose_kv_cache(arguments.kv_cache_dtype, files, model)
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            return evaluate(model, reference, windows, progress, kv_cache)
    except ValueError as error:
        raise ModelError(str(error)) from error


def _run_tasks(
    model: CausalLM, files: ModelFiles, arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Raises ConfigError if lm-eval is not installed or does not know a task."""
    try:
        from fastserve.evaluation.lm_eval_tasks import EvaluatedModel, run_tasks
    except ImportError as error:
        raise ConfigError(f"--tasks: needs lm-eval (pip install 'fastserve[eval]'): {error}") from error

    def load_engine() -> Model:
        return Model.load(
            arguments.model,
            dtype=arguments.dtype,
            quantization=arguments.quantization,
            activation_quantization=arguments.activation_quantization,
            kv_cache_dtype=arguments.kv_cache_dtype,
            device=arguments.device,
        )

    evaluated = EvaluatedModel(model, load_tokenizer(files), load_engine)
    try:
        return run_tasks(evaluated, arguments.tasks, arguments.limit, arguments.include_path)
    except ValueError as error:
        raise ConfigError(f"--{error}") from error


def quality_table(name: str, quality: Quality) -> Table:
    """The table of a model's quality, and of its reference's if there is one."""
    table = Table("model", "perplexity", "KL, nats/token", "top-1 agreement", "tokens")
    if quality.reference_perplexity is not None:
        table.add_row("reference", f"{quality.reference_perplexity:.4f}", "", "", str(quality.tokens))
    kl = "" if quality.kl is None else f"{quality.kl:.5f}"
    agreement = "" if quality.top1_agreement is None else f"{quality.top1_agreement:.2%}"
    table.add_row(Path(name).name, f"{quality.perplexity:.4f}", kl, agreement, str(quality.tokens))
    return table


def _tasks_table(figures: dict[str, dict[str, Any]]) -> Table:
    table = Table("task", "figure", "value", "standard error")
    for task, values in figures.items():
        for name, value in values.items():
            if "," not in name or "_stderr" in name or not isinstance(value, float):
                continue
            figure, filter_name = name.split(",")
            error = values.get(f"{figure}_stderr,{filter_name}")
            table.add_row(task, figure, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "")
    return table


def _print(figures: dict[str, Any], table: Table, as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures, default=str))
    else:
        Console().print(table)
