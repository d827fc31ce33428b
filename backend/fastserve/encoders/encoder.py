"""The embedded API: `Encoder.load(path)`, then its `embed`, `classify` or `rerank`.

A request is tokenized, computed together with whatever else is there, and answered with its own options: the
server (`ensemble.encoder`) does the three steps for many requests at once, the methods here for one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastserve.encoders.encoder_tokenizer import Text
from fastserve.encoders.heads import HeadKind
from fastserve.encoders.model_parts import EncoderOptions, ModelParts, load_parts
from fastserve.encoders.pooling import pool
from fastserve.encoders.ragged_batch import RaggedBatch, TokenSequence
from fastserve.encoders.results import Classification, RankedDocument, TokenLabel
from fastserve.errors import RequestError, invalid
from fastserve.text.validation import decode_text

MAX_BATCH_TOKENS = {"cpu": 512}
"""Tokens that are computed together, at most, by the kind of device. More gain nothing: on a CPU, activations
must stay in the caches near to its cores (MiniLM of 8 bits: 443 GFLOP/s at 331 tokens, 296 at 1,065)."""
OTHER_BATCH_TOKENS = 16384


class Encoder:
    """A model that embeds, classifies or reranks texts. Threads may share it: they compute in turn."""

    def __init__(self, parts: ModelParts) -> None:
        self.parts = parts
        self.task = parts.task
        """What it does: "embed", "classify" or "rerank"."""
        self.max_length = parts.max_length
        """Tokens of a text, or of a query and a document together, at most."""
        self.labels = parts.labels
        self._computing = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str = "auto",
        quantization: str = "auto",
        device: str = "auto",
        max_length: int = 0,
    ) -> Encoder:
        """The model in a Hugging Face directory (safetensors), or one of the hub.

        The arguments are those of `EncoderOptions`. Raises ModelError if it cannot be found or computed.
        """
        return cls(load_parts(path, EncoderOptions(dtype, quantization, device, max_length)))

    @property
    def dimensions(self) -> int:
        """Elements of an embedding."""
        parts = self.parts
        if parts.dense:
            return len(parts.dense[-1].weight)
        return parts.body.hidden_size * len(parts.recipe.pooling)

    def embed(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate: bool = False,
    ) -> np.ndarray:
        """The embeddings [len(texts), dimensions] float32.

        `prompt_name`: one of the model's prompts, which is written before each text; None: its default one.
        `dimensions`: so many elements, the first ones, of models that were trained for it (Matryoshka, arXiv
        2205.13147). `normalize`: to length 1; None: as the model's files say. `truncate`: a text of more than
        `max_length` tokens is cut. Raises RequestError naming the argument.
        """
        sequences = self.tokenize("embed", texts, truncate=truncate, prompt_name=prompt_name)
        return self.finish_embeddings(self.compute(sequences), dimensions, normalize)

    def classify(
        self, texts: Sequence[str], *, labels: Sequence[str] | None = None, truncate: bool = False
    ) -> list[Classification]:
        """The label of each text. `labels`: the only ones to choose from.

        Raises RequestError naming the argument.
        """
        sequences = self._tokenize_for("sequence", texts, truncate)
        rows = self.label_rows(labels)
        return self.finish_classes(self.compute(sequences), rows)

    def label_tokens(
        self, texts: Sequence[str], *, labels: Sequence[str] | None = None, truncate: bool = False
    ) -> list[list[TokenLabel]]:
        """The labels of each text's tokens. `labels`: the only ones to choose from.

        Raises RequestError naming the argument.
        """
        sequences = self._tokenize_for("token", texts, truncate)
        rows = self.label_rows(labels)
        scores = self.compute(sequences).split([len(sequence) for sequence in sequences])
        return [
            self.finish_tokens(text, each, rows, truncate) for text, each in zip(texts, scores, strict=True)
        ]

    def rerank(
        self, query: str, documents: Sequence[str], *, top_n: int | None = None, truncate: bool = False
    ) -> list[RankedDocument]:
        """The documents, the most relevant to the query first; `top_n` of them if that is given.

        Raises RequestError naming the argument.
        """
        sequences = self.tokenize_pairs(query, documents, truncate=truncate)
        return ranked(self.compute(sequences), top_n)

    # The three steps, which the server takes for many requests at once.

    def tokenize(
        self, task: str, texts: Sequence[str], *, truncate: bool, prompt_name: str | None = None
    ) -> list[TokenSequence]:
        """The tokens of texts for a task. Raises RequestError naming the argument."""
        self._check_task(task)
        _check_texts("texts", texts)
        return self.tokenize_rows(self.with_prompt(texts, prompt_name), "texts", truncate)

    def tokenize_rows(self, rows: Sequence[Text], field: str, truncate: bool) -> list[TokenSequence]:
        """The tokens of texts, or of pairs, that are known to be such; `field` is what errors call them."""
        return self.parts.tokenizer.encode(rows, self.max_length, truncate, field)

    def with_prompt(self, texts: Sequence[str], name: str | None) -> Sequence[str]:
        """The texts behind the model's prompt of that name; None: its default one. Raises RequestError."""
        prompt = self._prompt(name)
        return [prompt + text for text in texts] if prompt else texts

    def tokenize_pairs(self, query: str, documents: Sequence[str], *, truncate: bool) -> list[TokenSequence]:
        """The tokens of a query with each of the documents. Raises RequestError naming the argument."""
        self._check_task("rerank")
        if not isinstance(query, str):
            raise invalid("query", query, "a str")
        decode_text("query", query)
        _check_texts("documents", documents)
        return self.tokenize_rows([(query, document) for document in documents], "documents", truncate)

    @torch.inference_mode()
    def compute(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Float32: each sequence's vector or scores of labels; each token's where tokens are labelled."""
        parts = self.parts
        found = []
        with self._computing:
            for some in _batches(sequences, MAX_BATCH_TOKENS.get(parts.body.device.type, OTHER_BATCH_TOKENS)):
                batch = RaggedBatch.build(some, parts.body.device)
                hidden = parts.body.forward(batch)
                if parts.head is None:
                    found.append(pool(hidden, batch.cu_seqlens, parts.recipe.pooling))
                else:
                    found.append(self._activate(parts.head(hidden, batch)))
            result = torch.cat(found)
            for dense in parts.dense:
                result = dense(result)
        return result.cpu()

    def finish_embeddings(
        self, vectors: Tensor, dimensions: int | None, normalize: bool | None
    ) -> np.ndarray:
        """The embeddings of computed vectors [n, d], with the options of a request; see `embed`."""
        if dimensions is not None:
            vectors = vectors[:, : self.check_dimensions(dimensions)]
        if self.parts.recipe.normalize if normalize is None else normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=1)
        return np.ascontiguousarray(vectors.numpy())

    def finish_classes(self, scores: Tensor, rows: Sequence[int]) -> list[Classification]:
        """The labels of texts, of their scores [n, labels]; `rows`: see `label_rows`."""
        names = [self.labels[row] for row in rows]
        answers = []
        for values in scores[:, list(rows)].tolist():
            best = max(range(len(names)), key=values.__getitem__)
            by_label = dict(zip(names, values, strict=True))
            answers.append(Classification(names[best], values[best], by_label))
        return answers

    def finish_tokens(
        self, text: str, scores: Tensor, rows: Sequence[int], truncate: bool
    ) -> list[TokenLabel]:
        """The labels of a text's tokens, of their scores [tokens, labels]; tokens around it are left out."""
        best = scores[:, list(rows)].max(dim=1)
        spans = self.parts.tokenizer.spans(text, self.max_length, truncate)
        return [
            TokenLabel(*span, self.labels[rows[index]], score)
            for span, index, score in zip(spans, best.indices.tolist(), best.values.tolist(), strict=True)
            if span is not None
        ]

    def label_rows(self, labels: Sequence[str] | None) -> list[int]:
        """The rows of the labels that are asked for; None: all. Raises RequestError for one there is not."""
        if labels is None:
            return list(range(len(self.labels)))
        allowed = f"a list of some of {', '.join(self.labels[:20])}{', ...' if len(self.labels) > 20 else ''}"
        if isinstance(labels, str) or not isinstance(labels, Sequence) or not labels:
            raise invalid("labels", labels, allowed)
        for label in labels:
            if label not in self.labels:
                raise invalid("labels", label, allowed)
        return [self.labels.index(label) for label in labels]

    def check_dimensions(self, dimensions: Any) -> int:
        """Raises RequestError unless an embedding has so many."""
        if type(dimensions) is not int or not 1 <= dimensions <= self.dimensions:
            raise invalid("dimensions", dimensions, f"an integer from 1 to {self.dimensions}")
        return dimensions

    def _prompt(self, name: str | None) -> str:
        recipe = self.parts.recipe
        name = recipe.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in recipe.prompts:
            allowed = f"one of {', '.join(recipe.prompts)}" if recipe.prompts else "none: it has no prompts"
            raise invalid("prompt_name", name, allowed)
        return recipe.prompts[name]

    def _activate(self, logits: Tensor) -> Tensor:
        if self.parts.activation == "softmax":
            return logits.softmax(-1)
        return logits.sigmoid() if self.parts.activation == "sigmoid" else logits

    def _tokenize_for(self, kind: HeadKind, texts: Sequence[str], truncate: bool) -> list[TokenSequence]:
        self._check_task("classify")
        if self.parts.head_kind != kind:
            asked = {"sequence": "classify", "token": "label_tokens"}
            has = "tokens" if kind == "sequence" else "texts"
            raise RequestError(f"the model has labels of {has}; it does not {asked[kind]}")
        return self.tokenize("classify", texts, truncate=truncate)

    def _check_task(self, task: str) -> None:
        if task != self.task:
            raise RequestError(f"the model's task is `{self.task}`; it does not {task}")


def ranked(scores: Tensor, top_n: int | None) -> list[RankedDocument]:
    """The documents of scores [n, 1], best first, equal ones in order. Raises RequestError for `top_n`."""
    values = scores[:, 0].tolist()
    if top_n is not None and (type(top_n) is not int or top_n < 1):
        raise invalid("top_n", top_n, "an integer from 1 on")
    order = sorted(range(len(values)), key=lambda index: -values[index])
    return [RankedDocument(index, values[index]) for index in order[:top_n]]


def _check_texts(field: str, texts: Any) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise invalid(field, texts, "a list of str")
    if not texts:
        raise invalid(field, texts, "at least one text")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise invalid(f"{field}[{number}]", text, "a str")
        decode_text(f"{field}[{number}]", text)


def _batches(sequences: Sequence[TokenSequence], max_tokens: int) -> Iterator[list[TokenSequence]]:
    """The sequences in their order, as many together as have so many tokens, but one at least."""
    batch: list[TokenSequence] = []
    num_tokens = 0
    for sequence in sequences:
        if batch and num_tokens + len(sequence) > max_tokens:
            yield batch
            batch, num_tokens = [], 0
        batch.append(sequence)
        num_tokens += len(sequence)
    if batch:
        yield batch
