"""Loads a `TransformersModel`: transformers reads the weights, we check that it found all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig

from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.model_metadata import context_length
from fastserve.checkpoints.safetensors_files import open_safetensors, weight_files
from fastserve.checkpoints.tensor_problems import tensor_problems
from fastserve.models.causal_lm import resolve_max_model_len
from fastserve.models.transformers_model import TOLERANCES, TransformersModel


def load_transformers_model(
    path: Path,
    config: PretrainedConfig,
    dtype: torch.dtype | None,
    device: torch.device,
    max_model_len: int,
    state_dict: Mapping[str, Tensor] | None = None,
) -> TransformersModel:
    """Loads the model of a Hugging Face directory, or of the tensors `state_dict` of the file `path`.

    `dtype` None: the checkpoint's own. `max_model_len` 0: the model's own limit, in tokens.

    Raises ModelError if transformers cannot load it, or if it cannot be served through paged attention.
    """
    if config.is_encoder_decoder:
        raise ModelError(f"{path}: an encoder-decoder ({config.model_type}) is not a causal language model")
    max_position = resolve_max_model_len(path, context_length(path), max_model_len)
    if state_dict is None:
        for file in weight_files(path):
            open_safetensors(file, "numpy")
    model = _from_pretrained(path, config, dtype, state_dict)
    if model.dtype not in TOLERANCES:
        raise ModelError(f"{path}: its dtype is {model.dtype}; name one to serve it in")
    try:
        return TransformersModel(model.to(device).eval(), max_position)
    except ModelError as error:
        raise ModelError(f"{path}: {config.model_type} cannot be served: {error}") from error


def _from_pretrained(
    path: Path,
    config: PretrainedConfig,
    dtype: torch.dtype | None,
    state_dict: Mapping[str, Tensor] | None,
) -> Any:
    """The model as transformers loads it. Raises ModelError if it cannot, or if tensors are missing."""
    # The keyword changes the return type, which its annotation does not tell.
    loader: Any = AutoModelForCausalLM if state_dict is None else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        model, report = loader.from_pretrained(
            path if state_dict is None else None,
            config=config,
            state_dict=state_dict,
            dtype=dtype or "auto",
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"{path}: transformers cannot load it: {error}") from error
    problems = tensor_problems(missing=sorted(report["missing_keys"]))
    if problems:
        raise ModelError(f"{path}: {problems}")
    return model
