"""The training objective: the loss of a student on windows of text, beside a teacher."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastserve.compression.training.losses import (
    LogitLoss,
    attention_loss,
    hidden_state_loss,
    mean_logit_loss,
)
from fastserve.compression.training.training_attention import use_plain_attention


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype of matrix products in training: bfloat16, but float32 on CPUs without instructions for it."""
    capable = torch.cpu.get_capabilities()
    has_bfloat16 = device.type != "cpu" or any(capable.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if has_bfloat16 else torch.float32


@dataclass(frozen=True)
class FeatureWeights:
    """Weights of the losses of features, beside that of logits."""

    hidden_states: float = 0.0
    attention: float = 0.0


@dataclass(frozen=True)
class DecoderOutputs:
    """Outputs of a decoder for windows [n, T]."""

    final: Tensor
    """[n, T, hidden]: what the head takes."""
    hidden_states: tuple[Tensor, ...]
    """[n, T, hidden] after each layer, if asked for."""
    attentions: tuple[Tensor, ...]
    """[n, heads, T, T] of each layer, if asked for."""


class DecoderAndHead:
    """A causal model of transformers as its decoder and its head."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._head: Any = model.get_output_embeddings()
        config: Any = model.config
        self._factor = getattr(config, "logit_scale", None) or 1 / (
            getattr(config, "logits_scaling", None) or 1
        )
        self._cap = getattr(config, "final_logit_softcapping", None)

    @property
    def head(self) -> Tensor:
        """[vocab, hidden]."""
        weight: Tensor = self._head.weight
        return weight

    def forward(self, windows: Tensor, features: FeatureWeights) -> DecoderOutputs:
        """The decoder's outputs for windows [n, T] int64."""
        found = self.model.get_decoder()(
            input_ids=windows,
            use_cache=False,
            output_hidden_states=bool(features.hidden_states),
            output_attentions=bool(features.attention),
        )
        return DecoderOutputs(
            found.last_hidden_state, (found.hidden_states or ())[1:], found.attentions or ()
        )

    def logits(self, products: Tensor) -> Tensor:
        """[n, vocab] of the products [n, vocab] of hidden states and the head."""
        if self._head.bias is not None:
            products = products + self._head.bias
        if self._factor != 1:
            products = products * self._factor
        return products if self._cap is None else self._cap * torch.tanh(products / self._cap)


class Objective(nn.Module):
    """The loss of windows of text; its own parameters are the projections of hidden states."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        logit_loss: LogitLoss,
        weights: FeatureWeights | None = None,
    ) -> None:
        """`teacher` may be None where only the next tokens count."""
        super().__init__()
        self._student = DecoderAndHead(student)
        self._teacher = None if teacher is None else DecoderAndHead(teacher)
        self._logit_loss = logit_loss
        self._weights = weights or FeatureWeights()
        self._device = student.device
        self.projections = nn.ModuleList()
        if teacher is not None and self._weights.hidden_states:
            self.projections.extend(_projections(student, teacher))
        if self._device.type == "cpu" or self._weights.attention:
            for model in filter(None, (student, teacher)):
                use_plain_attention(model)

    def forward(self, windows: Tensor) -> Tensor:
        """The mean over the tokens of windows [n, T] int64."""
        windows = windows.to(self._device)
        with self._precision():
            student = self._student.forward(windows, self._weights)
            with torch.no_grad():
                teacher = None if self._teacher is None else self._teacher.forward(windows, self._weights)
            loss = self._loss_of_logits(windows, student, teacher)
            return loss if teacher is None else loss + self._loss_of_features(student, teacher)

    def _precision(self) -> AbstractContextManager[Any]:
        dtype = compute_dtype(self._device)
        return torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32)

    def _loss_of_logits(
        self, windows: Tensor, student: DecoderOutputs, teacher: DecoderOutputs | None
    ) -> Tensor:
        dtype = compute_dtype(self._device)
        next_ids = windows[:, 1:].flatten()
        hidden = student.final[:, :-1].flatten(0, 1).to(dtype)
        beside = None if teacher is None else teacher.final[:, :-1].flatten(0, 1).to(dtype)
        head = None if self._teacher is None else self._teacher.head.to(dtype)

        def loss(products: Tensor, chunk: slice) -> Tensor:
            expected = None
            if self._teacher is not None and beside is not None and head is not None:
                with torch.no_grad():
                    expected = self._teacher.logits(beside[chunk] @ head.T)
            return self._logit_loss(self._student.logits(products), expected, next_ids[chunk])

        return mean_logit_loss(hidden, self._student.head.to(dtype), loss)

    def _loss_of_features(self, student: DecoderOutputs, teacher: DecoderOutputs) -> Tensor:
        loss = torch.zeros((), device=self._device)
        count = max(len(student.hidden_states), len(student.attentions))
        pairs = paired_layers(count, max(len(teacher.hidden_states), len(teacher.attentions)))
        for layer, other in enumerate(pairs):
            if self._weights.hidden_states:
                projected = self.projections[layer](student.hidden_states[layer])
                found = hidden_state_loss(projected, teacher.hidden_states[other])
                loss = loss + self._weights.hidden_states / count * found
            if self._weights.attention:
                found = attention_loss(student.attentions[layer], teacher.attentions[other])
                loss = loss + self._weights.attention / count * found
        return loss


def paired_layers(student: int, teacher: int) -> list[int]:
    """The teacher's layer that each of the student's learns from: evenly, the last from the last."""
    return [(layer + 1) * teacher // student - 1 for layer in range(student)]


def _projections(student: PreTrainedModel, teacher: PreTrainedModel) -> list[nn.Module]:
    """A projection for each of the student's layers, from its hidden states to the width of the teacher's."""
    narrow, wide = (int(model.config.hidden_size) for model in (student, teacher))
    layers = range(int(student.config.num_hidden_layers))
    if narrow == wide:
        return [nn.Identity() for _ in layers]
    return [nn.Linear(narrow, wide, bias=False, device=student.device) for _ in layers]
