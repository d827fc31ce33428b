"""Reads a checkpoint into a `Decoder`.

Tensors are read one by one, fused and packed as they come: never is much more than one copy in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from fastserve import heap
from fastserve.checkpoints.checkpoint import Checkpoint
from fastserve.checkpoints.decoder_config import DecoderConfig
from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.quantization import quantize, quantize_head
from fastserve.checkpoints.weight_rows import stack_rows
from fastserve.models.decoder import Decoder, DecoderLayer, DecoderWeights
from fastserve.models.linear import AnyLinear, Linear, LinearRows
from fastserve_kernels.formats import Dense, Weight
from fastserve_kernels.preparation import prepare

Shapes = Mapping[str, tuple[int, ...]]
Quantize = Callable[[str, Tensor, str], Weight]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SHOWN = 8

logger = logging.getLogger(__name__)


def load_decoder(
    config: DecoderConfig,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    max_position: int,
    quantization: str,
    one_layer_at_a_time: bool = False,
) -> Decoder:
    """Raises ModelError if tensors are missing, misshapen or unexpected; it names them."""
    found = checkpoint.shapes
    if config.tie_word_embeddings and has_own_head(checkpoint, dtype):
        config = replace(config, tie_word_embeddings=False)
    expected = expected_shapes(config)
    if config.tie_word_embeddings and EMBEDDING not in found and HEAD in found:
        expected[HEAD] = expected.pop(EMBEDDING)
    _check(expected, checkpoint)
    weights = _Reader(config, checkpoint, dtype, device, quantization).weights(one_layer_at_a_time)
    return Decoder(config, weights, max_position)


def has_own_head(checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Whether a checkpoint whose config ties the head to the embedding has a head of other values in `dtype`,
    which training with untied weights leaves. It is used then, as transformers does."""
    shape = checkpoint.shapes.get(EMBEDDING)
    if shape is None or HEAD not in checkpoint.shapes:
        return False
    if shape == checkpoint.shapes[HEAD]:
        embedding, head = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        checkpoint.read(EMBEDDING, embedding)
        checkpoint.read(HEAD, head)
        if torch.equal(embedding, head):
            return False
    logger.warning("%s is not %s, though tie_word_embeddings is true: both are used", HEAD, EMBEDDING)
    return True


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this config has."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden, config.qkv_bias),
        "self_attn.k_proj": (keys, hidden, config.qkv_bias),
        "self_attn.v_proj": (keys, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, queries, config.output_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.query_key_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for name, size in norms.items():
            shapes[f"{prefix}{name}.weight"] = (size,)
        for name, (rows, columns, has_bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
    return shapes


def _check(expected: Shapes, checkpoint: Checkpoint) -> None:
    found = checkpoint.shapes
    missing = [name for name in expected if name not in found]
    others = [name for name in found if name not in expected and not _is_redundant(name)]
    left_behind = [name for name in others if _is_left_by_a_tool(name) or _adds_nothing(name, checkpoint)]
    unexpected = [name for name in others if name not in left_behind]
    misshapen = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{kind} tensors: {_shorten(names)}"
        for kind, names in (("missing", missing), ("misshapen", misshapen), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise ModelError("the checkpoint does not fit its config: " + "; ".join(problems))
    if left_behind:
        logger.warning("tensors without a use here, left by tools of training: %s", _shorten(left_behind))


def _is_redundant(name: str) -> bool:
    """Whether a tensor that a checkpoint may hold follows from the others, as the head that is tied to the
    embedding, or belongs to the cache, as the scales of keys and values."""
    return name == HEAD or name.endswith(("self_attn.k_scale", "self_attn.v_scale"))


def _is_left_by_a_tool(name: str) -> bool:
    """Whether it is a table of the rotary embedding, which old versions saved, or the value head of training
    by reinforcement."""
    return ".rotary_emb." in name or name.startswith(("v_head.", "model.v_head."))


def _adds_nothing(name: str, checkpoint: Checkpoint) -> bool:
    """Whether it is a bias of zeros: GPTQ tools write one for each linear layer, in any model."""
    weight = checkpoint.shapes.get(f"{name.removesuffix('.bias')}.weight")
    if not name.endswith(".bias") or weight is None or checkpoint.shapes[name] != weight[:1]:
        return False
    bias = torch.empty(weight[:1], dtype=torch.float32)
    checkpoint.read(name, bias)
    return not bias.any()


def _shorten(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


class _EmbeddingOnDemand:
    """The embedding of a decoder, read anew whenever rows are taken."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read

    def __getitem__(self, rows: Tensor) -> Tensor:
        heap.trim()
        return self._read()[rows]


class _LayersOnDemand(Sequence[DecoderLayer]):
    """The layers of a decoder, read anew whenever one is taken."""

    def __init__(self, read: Callable[[int], DecoderLayer], count: int) -> None:
        self._read = read
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> DecoderLayer: ...
    @overload
    def __getitem__(self, index: slice) -> list[DecoderLayer]: ...
    def __getitem__(self, index: int | slice) -> DecoderLayer | list[DecoderLayer]:
        if isinstance(index, slice):
            return [self._read(i) for i in range(*index.indices(self._count))]
        heap.trim()
        return self._read(range(self._count)[index])


class _Reader:
    """Reads the weights of a decoder, whose tensors are known to be there."""

    def __init__(
        self,
        config: DecoderConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        quantization: str,
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._quantization = quantization
        # Of tied ones, a tool that stores shared tensors once may keep either.
        self._embedding_name = EMBEDDING if EMBEDDING in checkpoint.shapes else HEAD

    def weights(self, one_layer_at_a_time: bool) -> DecoderWeights:
        layers = _LayersOnDemand(self._layer, self._config.num_layers)
        head = (self._embedding_name if self._config.tie_word_embeddings else HEAD).removesuffix(".weight")
        return DecoderWeights(
            embedding=_EmbeddingOnDemand(self._embedding) if one_layer_at_a_time else self._embedding(),
            layers=layers if one_layer_at_a_time else layers[:],
            final_norm=self._tensor("model.norm.weight"),
            head=self._linear(False, head, quantize=quantize_head),
        )

    def _embedding(self) -> Tensor:
        return self._tensor(self._embedding_name)

    def _layer(self, index: int) -> DecoderLayer:
        config, prefix = self._config, f"model.layers.{index}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        normed = config.query_key_norm
        return DecoderLayer(
            input_norm=self._tensor(f"{prefix}input_layernorm.weight"),
            qkv=self._linear(config.qkv_bias, *(f"{attention}{name}_proj" for name in "qkv")),
            query_norm=self._tensor(f"{attention}q_norm.weight") if normed else None,
            key_norm=self._tensor(f"{attention}k_norm.weight") if normed else None,
            output=self._linear(config.output_bias, f"{attention}o_proj"),
            mlp_norm=self._tensor(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self._linear(config.mlp_bias, f"{mlp}gate_proj", f"{mlp}up_proj"),
            down=self._linear(config.mlp_bias, f"{mlp}down_proj"),
            sliding_window=config.sliding_windows[index],
        )

    def _linear(self, has_bias: bool, *names: str, quantize: Quantize = quantize) -> AnyLinear:
        """The linears of these names, one below the other."""
        weights = stack_rows(self._weights([f"{name}.weight" for name in names], quantize))
        biases: Sequence[Tensor | None] = [None] * len(weights)
        if has_bias:
            bias = self._tensor(*(f"{name}.bias" for name in names))
            biases = bias.split([weight.out_features for weight in weights])
        parts = [
            Linear(prepare(weight, self._device, self._dtype), part)
            for weight, part in zip(weights, biases, strict=True)
        ]
        return parts[0] if len(parts) == 1 else LinearRows(tuple(parts))

    def _weights(self, names: list[str], quantize: Quantize) -> list[Weight]:
        """The matrices of these names."""
        if self._quantization != "auto":
            return [quantize(names[0], self._tensor(*names), self._quantization)]
        exact = self._dtype == torch.float32
        packed = [self._checkpoint.read_packed(name, exact) for name in names]
        if all(weight is None for weight in packed):
            return [Dense(self._tensor(*names))]
        return [
            Dense(self._tensor(name)) if weight is None else weight
            for name, weight in zip(names, packed, strict=True)
        ]

    def _tensor(self, *names: str) -> Tensor:
        """The tensors of these names, one below the other."""
        shapes = [self._checkpoint.shapes[name] for name in names]
        rows = [shape[0] for shape in shapes]
        fused = torch.empty(sum(rows), *shapes[0][1:], dtype=self._dtype, device=self._device)
        for name, part in zip(names, fused.split(rows), strict=True):
            self._checkpoint.read(name, part)
        return fused
