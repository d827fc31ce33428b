"""The model repository of the encoders that a server has, made for each run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from fastserve.config import Config
from fastserve.encoders.served_encoder import ServedEncoder, model_config
from fastserve.launcher.ascii_paths import ascii_path
from fastserve.launcher.run_directory import RunDirectory

MODEL = '''from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastserve.ensemble.encoder_model import EncoderModel


def TritonPythonModel() -> EncoderModel:
    """Imported here: the stub completes `triton_python_backend_utils` after it has read this file."""
    from fastserve.ensemble.encoder_model import EncoderModel

    return EncoderModel()
'''
"""The `model.py` of each."""


def write_encoder_models(run: RunDirectory, encoders: Sequence[ServedEncoder], config: Config) -> Path:
    """The repository, in the run's directory."""
    repository = run.path / "encoders"
    for encoder in encoders:
        path = ascii_path(run, f"encoder-{encoder.name}", encoder.settings.model)
        settings = msgspec.structs.replace(encoder.settings, model=path)
        model = repository / encoder.name
        (model / "1").mkdir(parents=True)
        (model / "1" / "model.py").write_text(MODEL)
        text = model_config(msgspec.structs.replace(encoder, settings=settings), config)
        (model / "config.pbtxt").write_text(text)
    return repository
