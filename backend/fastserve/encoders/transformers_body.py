"""Encoders that are none of our families: transformers computes them, padded to the longest of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastserve.checkpoints.model_error import ModelError
from fastserve.encoders.heads import HeadKind
from fastserve.encoders.ragged_batch import RaggedBatch

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class TransformersBody:
    """An `EncoderBody`; with a head, what it gives for hidden states are the logits of that."""

    def __init__(
        self,
        directory: Path,
        config: PretrainedConfig,
        dtype: torch.dtype,
        device: torch.device,
        head: HeadKind | None,
    ) -> None:
        """Raises ModelError if transformers cannot load it, or finds no weights for a part of it."""
        self.dtype, self.device = dtype, device
        self.hidden_size = int(config.hidden_size)
        self.max_length = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
        self._head = head
        self._model = _load(directory, config, dtype, head).to(device).eval()

    @torch.inference_mode()
    def forward(self, batch: RaggedBatch) -> Tensor:
        """The hidden states [T, hidden] of a batch; with a head its logits, [B, labels] or [T, labels]."""
        lengths = torch.tensor(batch.lengths, device=self.device)
        is_token = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]
        ids, kinds = (
            pad_sequence(list(each.split(batch.lengths)), batch_first=True)
            for each in (batch.token_ids, batch.token_type_ids)
        )
        inputs = {"input_ids": ids, "attention_mask": is_token.long()}
        if bool(kinds.any()):
            inputs["token_type_ids"] = kinds
        output: Any = self._model(**inputs)
        if self._head is None:
            return output.last_hidden_state[is_token]
        return output.logits if self._head == "sequence" else output.logits[is_token]


def logits_as_they_are(hidden: Tensor, batch: RaggedBatch) -> Tensor:
    """The `Head` of a `TransformersBody` that has one itself."""
    return hidden.float()


def _load(directory: Path, config: PretrainedConfig, dtype: torch.dtype, head: HeadKind | None) -> Any:
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

    classes: Mapping[HeadKind | None, Any] = {
        None: AutoModel,
        "sequence": AutoModelForSequenceClassification,
        "token": AutoModelForTokenClassification,
    }
    try:
        model, report = classes[head].from_pretrained(
            directory, config=config, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{directory}: transformers cannot load this {config.model_type!r}: {error}"
        ) from error
    missing = [name for name in report["missing_keys"] if "pooler" not in name]
    if missing:
        raise ModelError(f"{directory}: tensors are missing: {', '.join(sorted(missing)[:8])}")
    return model
