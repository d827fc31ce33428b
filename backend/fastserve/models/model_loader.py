"""From a path or a name to a model that is ready to serve: this file picks who reads and who computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastserve.checkpoints.checkpoint import Checkpoint
from fastserve.checkpoints.decoder_config import DecoderConfig, quant_method, unsupported_reason
from fastserve.checkpoints.gguf_architectures import DECODERS
from fastserve.checkpoints.gguf_checkpoint import GgufCheckpoint
from fastserve.checkpoints.gguf_config import gguf_config, gguf_decoder_config
from fastserve.checkpoints.gguf_file import GgufFile
from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.model_metadata import context_length
from fastserve.checkpoints.model_path import resolve_model_path
from fastserve.checkpoints.online_quantization import ACTIVATION_QUANTIZATIONS, QUANTIZATIONS
from fastserve.checkpoints.quant_methods import open_checkpoint
from fastserve.checkpoints.transformers_config import read_transformers_config
from fastserve.models.causal_lm import CausalLM, resolve_max_model_len
from fastserve.models.decoder import Decoder
from fastserve.models.decoder_loader import load_decoder
from fastserve.models.linear import AnyLinear, parts_of
from fastserve.models.pipeline_stage import check_stage_count
from fastserve.models.tensor_parallel import check_head_counts
from fastserve_kernels.cpu.kernels import cpu_features
from fastserve_kernels.process_group import ProcessGroup

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_model(
    model: str,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    max_model_len: int = 0,
    quantization: str = "auto",
    activation_quantization: str = "none",
    one_layer_at_a_time: bool = False,
    group: ProcessGroup | None = None,
    stage: tuple[int, int] = (0, 1),
) -> CausalLM:
    """Loads a Hugging Face directory (safetensors), a GGUF file or a model of the hub.

    `dtype`: "bfloat16", "float16", "float32", or "auto": the checkpoint's own, bfloat16 for GGUF.
    `max_model_len`: tokens of the longest sequence; 0: the model's own limit.
    `quantization`: "auto": weights as the checkpoint holds them; else for weights that are not quantized yet,
    and for those of GGUF: "none": all in `dtype`; "int4", "int8", "nf4", "fp8" or "w8a8": rounded to that.
    `activation_quantization`: "int8": activations that meet weights of 4 or 8 bits (int4, int8) are rounded
    to 8 bits, in groups, by our decoder on a CPU that has the instructions; "none": they are not, but by
    w8a8, which always does; "auto": they are where that is measured to be faster, in bfloat16.
    `one_layer_at_a_time`: our decoder's layers are read from the file in each forward pass, for passes over
    many tokens; what transformers' own code runs is loaded whole.
    `group`: of the ranks that load a part of it each, all with the same arguments; our decoder only.
    `stage`: which of how many stages it is, each of which has some of the layers; our decoder only.

    Raises ModelError if the model cannot be found, read or served.
    """
    path = resolve_model_path(model)
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype: got {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    if quantization not in QUANTIZATIONS:
        raise ModelError(f"quantization: got {quantization!r}; allowed: {', '.join(QUANTIZATIONS)}")
    if activation_quantization not in ACTIVATION_QUANTIZATIONS:
        raise ModelError(
            f"activation_quantization: got {activation_quantization!r}; "
            f"allowed: {', '.join(ACTIVATION_QUANTIZATIONS)}"
        )
    loader = _ModelLoader(
        path,
        DTYPES.get(dtype),
        torch.device(device),
        max_model_len,
        quantization,
        activation_quantization,
        one_layer_at_a_time,
        group,
        stage,
    )
    return loader.load_gguf() if path.is_file() else loader.load_directory()


def check_rank_count(path: Path, world_size: int, num_stages: int) -> None:
    """Raises ModelError if so many ranks, or stages of them, cannot share the model at this path."""
    if path.is_file():
        file = GgufFile(path)
        reason: str | None = f"its architecture is {file.architecture!r}"
        decoder = gguf_decoder_config(file) if file.architecture in DECODERS else None
    else:
        config = read_transformers_config(path)
        reason = unsupported_reason(config)
        decoder = DecoderConfig.from_transformers(config) if reason is None else None
    if decoder is None:
        raise _not_shared(path, world_size, num_stages, reason)
    check_head_counts(decoder, world_size)
    check_stage_count(decoder, num_stages)


def _not_shared(path: Path, world_size: int, num_stages: int, reason: str | None) -> ModelError:
    name, size = ("tensor", world_size) if world_size > 1 else ("pipeline", num_stages)
    return ModelError(
        f"{name}_parallel_size: got {size}; allowed for {path}: 1, because transformers' own code runs "
        f"it ({reason})"
    )


def quantizes_activations(decoder: Decoder) -> bool:
    """Whether any of its weights meets activations of 8 bits, in groups."""
    return any(part.weight.operator.endswith("_a8") for each in _linears(decoder) for part in parts_of(each))


def _linears(decoder: Decoder) -> Iterator[AnyLinear]:
    if decoder.weights.lm_head is not None:
        yield decoder.weights.lm_head
    for layer in decoder.weights.layers:
        yield from (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj)


@dataclass(frozen=True)
class _ModelLoader:
    """The arguments of `load_model`, checked."""

    path: Path
    dtype: torch.dtype | None
    """None: the checkpoint's own."""
    device: torch.device
    max_model_len: int
    quantization: str
    activation_quantization: str
    one_layer_at_a_time: bool
    group: ProcessGroup | None
    stage: tuple[int, int]

    def load_directory(self) -> CausalLM:
        config = read_transformers_config(self.path)
        reason = unsupported_reason(config)
        if reason is not None:
            self._check_ours(reason)
            return self._load_transformers_model(config)
        method = quant_method(config)
        if method is not None and self.quantization != "auto":
            raise ModelError(
                f"quantization: got {self.quantization!r}; allowed for {self.path}: auto, because its "
                f"weights are quantized already (quant_method {method!r})"
            )
        checkpoint = open_checkpoint(self.path, config)
        return self._load_decoder(DecoderConfig.from_transformers(config), checkpoint)

    def load_gguf(self) -> CausalLM:
        file = GgufFile(self.path)
        if file.architecture in DECODERS:
            return self._load_decoder(gguf_decoder_config(file), GgufCheckpoint(file))
        config = gguf_config(file)
        self._check_ours(f"its architecture is {file.architecture!r}")
        return self._load_transformers_model(config, file)

    def _load_decoder(self, config: DecoderConfig, checkpoint: Checkpoint) -> CausalLM:
        dtype = self.dtype or checkpoint.dtype
        decoder = load_decoder(
            config,
            checkpoint,
            dtype,
            self.device,
            resolve_max_model_len(self.path, context_length(self.path), self.max_model_len),
            self.quantization,
            self._choose_activations(dtype),
            self.one_layer_at_a_time,
            self.group,
            self.stage,
        )
        if self.activation_quantization == "int8" and not quantizes_activations(decoder):
            raise ModelError(
                f"activation_quantization: got 'int8'; allowed for {self.path} with quantization "
                f"{self.quantization!r}: auto, none, because no weight has 4 or 8 bits as int4 and int8 have"
            )
        return decoder

    def _choose_activations(self, dtype: torch.dtype) -> Callable[[], bool]:
        """Whether they are to be rounded. Raises ModelError where it is asked for and cannot be done."""
        has_kernels = self.device.type == "cpu" and cpu_features.has(*cpu_features.INTEGER_PRODUCTS)
        if self.activation_quantization == "int8" and not has_kernels:
            raise ModelError(
                f"activation_quantization: got 'int8'; allowed: auto, none on {self.device.type}"
                f"{' without AVX2, FMA and F16C' if self.device.type == 'cpu' else ''}"
            )
        if self.activation_quantization != "auto":
            return lambda: self.activation_quantization == "int8"
        if not has_kernels or dtype != torch.bfloat16:
            return lambda: False
        from fastserve_kernels.integer_products import integer_products_pay  # here: a GPU needs no numba

        if self.group is None:
            return lambda: integer_products_pay(dtype)
        is_leader = self.group.rank == 0
        # Of all ranks one measures, while the others wait: they must compute in one way.
        pay = self.group.broadcast(torch.tensor([integer_products_pay(dtype)]).long() if is_leader else None)
        return lambda: bool(pay)

    def _load_transformers_model(self, config: PretrainedConfig, gguf: GgufFile | None = None) -> CausalLM:
        # Imported here: they bring all of transformers' modelling code, which our decoder does not need.
        from fastserve.checkpoints.gguf_state_dict import read_state_dict
        from fastserve.models.transformers_loader import load_transformers_model

        if gguf is None:
            return load_transformers_model(self.path, config, self.dtype, self.device, self.max_model_len)
        dtype = self.dtype or GgufCheckpoint.dtype
        state = read_state_dict(gguf, config, dtype)
        return load_transformers_model(self.path, config, dtype, self.device, self.max_model_len, state)

    def _check_ours(self, reason: str) -> None:
        """Raises ModelError if weights or activations of a model that transformers' code runs are to be
        rounded, or if it is to be shared by several ranks."""
        if self.group is not None or self.stage[1] > 1:
            world_size = 1 if self.group is None else self.group.world_size
            raise _not_shared(self.path, world_size, self.stage[1], reason)
        if self.activation_quantization == "int8":
            raise ModelError(
                f"activation_quantization: got 'int8'; allowed for {self.path}: auto, none, because "
                f"transformers' own code runs it ({reason})"
            )
        if self.quantization not in ("auto", "none"):
            raise ModelError(
                f"quantization: got {self.quantization!r}; allowed for {self.path}: auto, none, because "
                f"transformers' own code runs it ({reason})"
            )
