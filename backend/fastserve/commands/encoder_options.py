"""The flags of `fastserve serve` for encoders, and the models that they name."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from fastserve.checkpoints.model_path import resolve_model_path
from fastserve.config import Config, ConfigError
from fastserve.encoders.encoder_profile import encoder_profile
from fastserve.encoders.served_encoder import EncoderSettings, ServedEncoder, check_priority_range
from fastserve.launcher.repository import model_names, model_repository

DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATION_NAMES = ("auto", "none", "int4", "nf4", "int8", "fp8", "w8a8")
"""Those of `model_parts`, which loads torch."""
_NAMED = re.compile(r"([A-Za-z_][A-Za-z0-9_-]*)=(.+)", re.DOTALL)


def add_encoder_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that `served_encoders` reads."""
    group = parser.add_argument_group("encoders")
    group.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="a model that embeds, classifies or reranks, served as `embed`, `classify` or `rerank` or "
        "under a name of your own: directory (safetensors) or hub name; may be repeated",
    )
    group.add_argument(
        "--encoders-only", action="store_true", help="serve the encoders, and no model that generates text"
    )
    group.add_argument(
        "--encoder-dtype",
        choices=DTYPE_NAMES,
        default="auto",
        help="of the encoders' weights and activations; auto: the checkpoint's own (default: %(default)s)",
    )
    group.add_argument(
        "--encoder-quantization",
        choices=QUANTIZATION_NAMES,
        default="auto",
        help="of the encoders' weights, as --quantization (default: %(default)s)",
    )
    group.add_argument(
        "--encoder-threads",
        type=int,
        default=0,
        metavar="N",
        help="of each encoder on a CPU; 0: all cores, or half of them beside a model that generates text "
        "(default: %(default)s)",
    )


def served_encoders(arguments: argparse.Namespace, config: Config) -> tuple[ServedEncoder, ...]:
    """The encoders that the flags name; what is not known of one yet is measured. Raises ConfigError, and
    ModelError for one that cannot be loaded."""
    if arguments.encoders_only and not arguments.encoder:
        raise ConfigError("--encoders-only: got no encoder; allowed: with at least one --encoder")
    if arguments.encoder_threads < 0:
        raise ConfigError(f"--encoder-threads: got {arguments.encoder_threads}; allowed: 0 or more")
    if arguments.encoder:
        check_priority_range(config)
    found: dict[str, ServedEncoder] = {}
    taken = () if arguments.encoders_only else model_names(arguments.model_repository or model_repository())
    for given in arguments.encoder:
        encoder = _served(given, arguments, config)
        if encoder.name in found or encoder.name in taken:
            raise ConfigError(
                f"--encoder: got {given!r}, a second model `{encoder.name}`; allowed: NAME=PATH with a name "
                "that no other model has"
            )
        found[encoder.name] = encoder
    return tuple(found.values())


def _served(given: str, arguments: argparse.Namespace, config: Config) -> ServedEncoder:
    named = None if Path(given).exists() else _NAMED.fullmatch(given)
    name, model = (named[1], named[2]) if named else ("", given)
    settings = EncoderSettings(
        model=str(resolve_model_path(model).resolve()),
        dtype=arguments.encoder_dtype,
        quantization=arguments.encoder_quantization,
        device=config.device,
        num_threads=_num_threads(arguments),
    )
    print(f"Measuring {model} where that has not been done yet", file=sys.stderr)
    profile = encoder_profile(settings)
    return ServedEncoder(name=name or profile.task, settings=settings, profile=profile)


def _num_threads(arguments: argparse.Namespace) -> int:
    cores = len(os.sched_getaffinity(0))
    share = cores if arguments.encoders_only else max(1, cores // 2)
    return arguments.encoder_threads or share
