"""From a path or a name to a model that is ready to serve."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PretrainedConfig

from fastserve.checkpoints.decoder_config import DecoderConfig, quant_method, unsupported_reason
from fastserve.checkpoints.gguf_architectures import DECODERS
from fastserve.checkpoints.gguf_checkpoint import GgufCheckpoint
from fastserve.checkpoints.gguf_config import gguf_config, gguf_decoder_config
from fastserve.checkpoints.gguf_file import GgufFile
from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.model_metadata import context_length
from fastserve.checkpoints.model_path import resolve_model_path
from fastserve.checkpoints.online_quantization import QUANTIZATIONS
from fastserve.checkpoints.quant_methods import open_checkpoint
from fastserve.checkpoints.transformers_config import read_transformers_config
from fastserve.models.causal_lm import CausalLM, resolve_max_model_len
from fastserve.models.decoder_loader import load_decoder

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_model(
    model: str,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    max_model_len: int = 0,
    quantization: str = "auto",
    one_layer_at_a_time: bool = False,
) -> CausalLM:
    """Loads a Hugging Face directory (safetensors), a GGUF file or a model of the hub.

    `dtype`: "bfloat16", "float16", "float32", or "auto": the checkpoint's own, bfloat16 for GGUF.
    `max_model_len`: tokens of the longest sequence; 0: the model's own limit.
    `quantization`: "auto": weights as the checkpoint holds them; else for weights that are not quantized yet,
    and for those of GGUF: "none": all in `dtype`; "int4", "int8", "nf4", "fp8" or "w8a8": rounded to that.
    `one_layer_at_a_time`: our decoder's layers are read from the file in each forward pass, for passes over
    many tokens; what transformers' own code runs is loaded whole.

    Raises ModelError if the model cannot be found, read or served.
    """
    path, device = resolve_model_path(model), torch.device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype: got {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    if quantization not in QUANTIZATIONS:
        raise ModelError(f"quantization: got {quantization!r}; allowed: {', '.join(QUANTIZATIONS)}")
    if path.is_file():
        return _load_gguf(path, dtype, device, max_model_len, quantization, one_layer_at_a_time)
    config = read_transformers_config(path)
    reason = unsupported_reason(config)
    if reason is None:
        method = quant_method(config)
        if method is not None and quantization != "auto":
            raise ModelError(
                f"quantization: got {quantization!r}; allowed for {path}: auto, because its weights are "
                f"quantized already (quant_method {method!r})"
            )
        return _load_directory(path, config, dtype, device, max_model_len, quantization, one_layer_at_a_time)
    _check_dense(path, quantization, reason)
    # Imported here because it brings all of transformers' modelling code, which our decoder does not need.
    from fastserve.models.transformers_model import load_transformers_model

    return load_transformers_model(path, config, DTYPES.get(dtype), device, max_model_len)


def _load_gguf(
    path: Path,
    dtype: str,
    device: torch.device,
    max_model_len: int,
    quantization: str,
    one_layer_at_a_time: bool,
) -> CausalLM:
    file = GgufFile(path)
    wanted = DTYPES.get(dtype, GgufCheckpoint.dtype)
    described = gguf_config(file)
    if file.architecture in DECODERS:
        config, checkpoint = gguf_decoder_config(file), GgufCheckpoint(file)
        max_position = resolve_max_model_len(path, context_length(path), max_model_len)
        return load_decoder(
            config, checkpoint, wanted, device, max_position, quantization, one_layer_at_a_time
        )
    _check_dense(path, quantization, f"its architecture is {file.architecture!r}")
    from fastserve.checkpoints.gguf_state_dict import read_state_dict
    from fastserve.models.transformers_model import load_transformers_model

    state = read_state_dict(file, described, wanted)
    return load_transformers_model(path, described, wanted, device, max_model_len, state)


def _check_dense(path: Path, quantization: str, reason: str) -> None:
    """Raises ModelError if the weights of a model that transformers' code runs are to be rounded."""
    if quantization not in ("auto", "none"):
        raise ModelError(
            f"quantization: got {quantization!r}; allowed for {path}: auto, none, because transformers' "
            f"own code runs it ({reason})"
        )


def _load_directory(
    path: Path,
    config: PretrainedConfig,
    dtype: str,
    device: torch.device,
    max_model_len: int,
    quantization: str,
    one_layer_at_a_time: bool,
) -> CausalLM:
    checkpoint = open_checkpoint(path, config)
    decoder_config = DecoderConfig.from_transformers(config)
    max_position = resolve_max_model_len(path, context_length(path), max_model_len)
    own_or_wanted = checkpoint.dtype if dtype == "auto" else DTYPES[dtype]
    return load_decoder(
        decoder_config, checkpoint, own_or_wanted, device, max_position, quantization, one_layer_at_a_time
    )
