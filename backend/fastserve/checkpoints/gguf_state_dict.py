"""The tensors of a GGUF file for transformers' own modules: dequantized, under transformers' names."""

from __future__ import annotations

import torch
from gguf import ReaderTensor
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from fastserve.checkpoints.gguf_architectures import ARCHITECTURES, GgufArchitecture
from fastserve.checkpoints.gguf_file import GgufFile, tensor_shape
from fastserve.checkpoints.gguf_tensor import deinterleave, dequantize_into
from fastserve.checkpoints.gguf_tensor_names import gguf_names
from fastserve.checkpoints.model_error import ModelError


def read_state_dict(file: GgufFile, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every parameter of the model that `config` describes, but those that are tied to others, in `dtype`.

    Raises ModelError if the file lacks one, has others, or has one of another shape.
    """
    architecture = ARCHITECTURES[file.architecture]
    shapes = _parameter_shapes(config)
    names = gguf_names(file, config.num_hidden_layers, shapes)
    heads = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}
    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensor = file.tensors[names[name]]
        found = tensor_shape(tensor)
        if found != shape:
            raise ModelError(f"{file.path}: {names[name]} is {list(found)} instead of {list(shape)}")
        head_count = next((count for part, count in heads.items() if part in name), None)
        state[name] = _read(tensor, name, architecture, head_count, dtype)
    return state


def _parameter_shapes(config: PretrainedConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        meta_model = AutoModelForCausalLM.from_config(config)
    tied = set(meta_model.all_tied_weights_keys)
    return {name: parameter.shape for name, parameter in meta_model.named_parameters() if name not in tied}


def _read(
    tensor: ReaderTensor, name: str, architecture: GgufArchitecture, heads: int | None, dtype: torch.dtype
) -> Tensor:
    """A parameter as transformers has it; `heads`: of queries or keys, whose rows may be interleaved."""
    read = torch.empty(tensor_shape(tensor), dtype=torch.float32 if "norm" in name else dtype)
    dequantize_into(tensor, read)
    if architecture.interleaved and heads is not None:
        read = deinterleave(read, heads)
    if architecture.shifted_norms and name.endswith("norm.weight"):
        read -= 1
    return read.to(dtype)
