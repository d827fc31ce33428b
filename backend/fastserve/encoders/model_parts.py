"""From a directory to the parts of an encoder model: this file picks who reads and who computes it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastserve.checkpoints.decoder_config import quant_method, unsupported_reason
from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.model_path import resolve_model_path
from fastserve.checkpoints.online_quantization import QUANTIZATIONS
from fastserve.checkpoints.quant_methods import open_checkpoint
from fastserve.checkpoints.transformers_config import read_transformers_config
from fastserve.encoders.decoder_body import DecoderBody
from fastserve.encoders.dense_layers import EmbeddingDense, load_dense
from fastserve.encoders.encoder_checkpoint import EncoderCheckpoint
from fastserve.encoders.encoder_config import encoder_config, has_own_encoder
from fastserve.encoders.encoder_loader import EncoderLoader, body_shapes
from fastserve.encoders.encoder_model import EncoderBody
from fastserve.encoders.encoder_tokenizer import EncoderTokenizer
from fastserve.encoders.heads import Head, HeadKind, head_modules, load_head
from fastserve.encoders.sentence_transformer import SentenceTransformer, read_sentence_transformer
from fastserve.encoders.smoothing import observe_inputs
from fastserve.encoders.task import Activation, Task, activation_of, head_kind_of, task_of
from fastserve.encoders.transformers_body import TransformersBody, logits_as_they_are
from fastserve.models.decoder import Decoder
from fastserve.models.linear_reader import LinearReader
from fastserve.models.model_loader import DTYPES, load_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ModelParts:
    """What an `Encoder` is made of."""

    task: Task
    body: EncoderBody
    tokenizer: EncoderTokenizer
    max_length: int
    """Tokens of a text, or of a pair, at most."""
    recipe: SentenceTransformer
    """How hidden states become embeddings, where that is the task."""
    dense: tuple[EmbeddingDense, ...] = ()
    """Behind the pooling."""
    head: Head | None = None
    """What gives the labels' scores, where there are labels."""
    head_kind: HeadKind | None = None
    labels: tuple[str, ...] = ()
    activation: Activation = "softmax"
    """From the labels' scores to what is answered."""


@dataclass(frozen=True)
class EncoderOptions:
    """How a model is loaded."""

    dtype: str = "auto"
    """"float32", "bfloat16", "float16"; "auto": the checkpoint's own."""
    quantization: str = "auto"
    """"auto": weights as the checkpoint holds them; else as `load_model` has it."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:N"; "auto": a GPU if there is one."""
    max_length: int = 0
    """Tokens of a text at most; 0: what the model's files say."""

    def check(self) -> None:
        """Raises ModelError naming a field that cannot be."""
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ModelError(f"dtype: got {self.dtype!r}; allowed: auto, {', '.join(DTYPES)}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ModelError(f"device: got {self.device!r}; allowed: auto, cpu, cuda, cuda:N")
        if self.quantization not in QUANTIZATIONS:
            raise ModelError(f"quantization: got {self.quantization!r}; allowed: {', '.join(QUANTIZATIONS)}")

    def torch_device(self) -> torch.device:
        """The device that is meant."""
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class _PartsLoader:
    """Loads one model."""

    directory: Path
    """Of the transformer: where its config, weights and tokenizer lie."""
    recipe: SentenceTransformer
    config: PretrainedConfig
    options: EncoderOptions
    tokenizer: EncoderTokenizer

    def load(self, task: Task) -> ModelParts:
        kind = head_kind_of(task, self.config)
        body, head = self._body_and_head(kind)
        return ModelParts(
            task=task,
            body=body,
            tokenizer=self.tokenizer,
            max_length=self._max_length(body),
            recipe=self.recipe,
            dense=tuple(load_dense(module, self.options.torch_device()) for module in self.recipe.dense),
            head=head,
            head_kind=kind,
            labels=() if kind is None else tuple(_labels(self.config)),
            activation=activation_of(task, self.config),
        )

    def _body_and_head(self, kind: HeadKind | None) -> tuple[EncoderBody, Head | None]:
        if has_own_encoder(self.config):
            return self._own_encoder(kind)
        if kind is None and unsupported_reason(self.config) is None:
            return self._decoder(), None
        return self._transformers_encoder(kind)

    def _own_encoder(self, kind: HeadKind | None) -> tuple[EncoderBody, Head | None]:
        config = encoder_config(self.config)
        self._check_quantization(quant_method(self.config))
        checkpoint = EncoderCheckpoint(open_checkpoint(self.directory, self.config), config.names.prefix)
        expected = body_shapes(config)
        modules = None if kind is None else head_modules(config, kind, len(_labels(self.config)))
        checkpoint.check(expected | ({} if modules is None else modules.shapes(config)), config.names)
        reader = LinearReader(
            checkpoint,
            DTYPES.get(self.options.dtype) or checkpoint.dtype,
            self.options.torch_device(),
            self.options.quantization,
            lambda: False,
        )
        inputs = None
        if self.options.quantization == "w8a8":
            plain = EncoderLoader(config, replace(reader, quantization="none")).load()
            inputs = observe_inputs(plain, self.tokenizer)
        body = EncoderLoader(config, reader, inputs).load()
        if kind is None or modules is None:
            return body, None
        # A head is a hundredth of the products, and its errors are those of the answer.
        exact = LinearReader(checkpoint, reader.dtype, reader.device, "auto", lambda: False)
        return body, load_head(EncoderLoader(config, exact), modules, kind, self.config)

    def _decoder(self) -> EncoderBody:
        options = self.options
        decoder = load_model(
            str(self.directory), options.dtype, options.torch_device(), 0, options.quantization
        )
        assert isinstance(decoder, Decoder)
        return DecoderBody(decoder)

    def _transformers_encoder(self, kind: HeadKind | None) -> tuple[EncoderBody, Head | None]:
        if self.options.quantization not in ("auto", "none"):
            raise ModelError(
                f"quantization: got {self.options.quantization!r}; allowed for {self.directory}: auto, none, "
                f"because transformers' own code runs it (model_type {self.config.model_type!r})"
            )
        dtype = DTYPES.get(self.options.dtype) or getattr(self.config, "dtype", None) or torch.float32
        device = self.options.torch_device()
        body = TransformersBody(self.directory, self.config, dtype, device, kind)
        if kind is None:
            return body, None
        return body, logits_as_they_are

    def _check_quantization(self, method: str | None) -> None:
        if method is not None and self.options.quantization != "auto":
            raise ModelError(
                f"quantization: got {self.options.quantization!r}; allowed for {self.directory}: auto, "
                f"because its weights are quantized already (quant_method {method!r})"
            )

    def _max_length(self, body: EncoderBody) -> int:
        most = min(body.max_length, self.tokenizer.model_max_length)
        if self.options.max_length > body.max_length:
            raise ModelError(
                f"max_length: got {self.options.max_length}; allowed: at most {body.max_length}, "
                "the model's own"
            )
        return self.options.max_length or min(most, self.recipe.max_length or most)


def load_parts(model: str | Path, options: EncoderOptions) -> ModelParts:
    """The parts of the model in a directory, or of a model of the hub.

    Raises ModelError if it cannot be found, read or computed; the sentence names the field.
    """
    options.check()
    root = resolve_model_path(str(model))
    if not root.is_dir():
        raise ModelError(f"{root}: not a directory; allowed: a Hugging Face directory with safetensors files")
    recipe = read_sentence_transformer(root)
    directory = root if recipe is None else recipe.directory
    config = read_transformers_config(directory)
    task = task_of(root, config, has_recipe=recipe is not None)
    recipe = recipe or SentenceTransformer(directory)
    tokenizer = EncoderTokenizer(directory, recipe.do_lower_case)
    return _PartsLoader(directory, recipe, config, options, tokenizer).load(task)


def _labels(config: PretrainedConfig) -> list[str]:
    labels: dict[int, str] = config.id2label or {}  # type: ignore[assignment]
    return [labels[number] for number in range(len(labels))]
