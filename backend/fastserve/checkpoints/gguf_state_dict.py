"""The tensors of a GGUF file for transformers' own modules: dequantized, under transformers' names."""

from __future__ import annotations

from collections.abc import Iterable

import gguf
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from fastserve.checkpoints.gguf_architectures import ARCHITECTURES
from fastserve.checkpoints.gguf_file import GgufFile
from fastserve.checkpoints.gguf_rope import LONG_FACTORS, SHORT_FACTORS
from fastserve.checkpoints.gguf_tensor import deinterleave, dequantize_into
from fastserve.checkpoints.model_error import ModelError

_SHOWN = 8


def read_state_dict(file: GgufFile, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every parameter of the model that the config describes, but those that are tied to others.

    Raises ModelError if the file has not all of them, or has others.
    """
    architecture = ARCHITECTURES[file.architecture]
    with torch.device("meta"):
        meta_model = AutoModelForCausalLM.from_config(config)
    tied = set(meta_model.all_tied_weights_keys)
    shapes = {name: parameter.shape for name, parameter in meta_model.named_parameters() if name not in tied}
    names = _gguf_names(file, config.num_hidden_layers, shapes)
    heads = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}
    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensor = file.tensors[names[name]]
        found = tuple(int(size) for size in reversed(tensor.shape))
        if found != shape:
            raise ModelError(f"{file.path}: {names[name]} is {list(found)} instead of {list(shape)}")
        read = torch.empty(shape, dtype=torch.float32 if "norm" in name else dtype)
        dequantize_into(tensor, read)
        count = next((count for part, count in heads.items() if part in name), None)
        if architecture.interleaved and count is not None:
            read = deinterleave(read, count)
        if architecture.shifted_norms and name.endswith("norm.weight"):
            read -= 1
        state[name] = read.to(dtype)
    return state


def _gguf_names(file: GgufFile, num_layers: int, names: Iterable[str]) -> dict[str, str]:
    """llama.cpp's name of each parameter. Raises ModelError if these are not the tensors of the file."""
    by_name = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    name_map = gguf.get_tensor_name_map(by_name[file.architecture], num_layers)
    found = {name: name_map.get_name(name, try_suffixes=(".weight", ".bias")) or name for name in names}
    missing = [ours for ours, theirs in found.items() if theirs not in file.tensors]
    unexpected = file.tensors.keys() - found.values() - {SHORT_FACTORS, LONG_FACTORS}
    problems = [
        f"{kind} tensors: {', '.join(sorted(tensors)[:_SHOWN])}"
        for kind, tensors in (("missing", missing), ("unexpected", unexpected))
        if tensors
    ]
    if problems:
        raise ModelError(f"{file.path}: it does not fit its metadata: {'; '.join(problems)}")
    return found
