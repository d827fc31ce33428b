"""The profile of an encoder: measured once on this machine, then kept in the cache. Imports no torch."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import msgspec

from fastserve.atomic_write import write_bytes
from fastserve.cache_directory import cache_path
from fastserve.checkpoints.model_error import ModelError
from fastserve.encoders.served_encoder import EncoderProfile, EncoderSettings

SUFFIXES = {".json", ".safetensors", ".txt", ".model"}
"""Of the files of a model that a profile depends on."""


def encoder_profile(settings: EncoderSettings) -> EncoderProfile:
    """The profile of these settings; `settings.model` is a directory. Raises ModelError as `Encoder.load`."""
    path = cache_path("encoders") / f"{_key(settings)}.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=EncoderProfile)
    except (OSError, msgspec.DecodeError):
        profile = _measure(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, msgspec.json.encode(profile))
    return profile


def _measure(settings: EncoderSettings) -> EncoderProfile:
    command = [
        sys.executable,
        "-m",
        "fastserve.encoders.measure_steps",
        msgspec.json.encode(settings).decode(),
    ]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        raise ModelError(finished.stderr.strip().splitlines()[-1] if finished.stderr.strip() else "no output")
    return msgspec.json.decode(finished.stdout.strip().splitlines()[-1].encode(), type=EncoderProfile)


def _key(settings: EncoderSettings) -> str:
    """Changes with the settings, the model's files and this package."""
    files = [
        (str(path.relative_to(settings.model)), status.st_size, status.st_mtime_ns)
        for path in sorted(Path(settings.model).rglob("*"))
        if path.suffix in SUFFIXES and path.is_file()
        for status in [path.stat()]
    ]
    told = msgspec.json.encode([settings, files, _source_digest()])
    return hashlib.sha256(told).hexdigest()[:32]


def _source_digest() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
