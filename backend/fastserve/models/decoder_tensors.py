"""The tensors of a decoder of the Llama family: what a config asks for, and whether a checkpoint has it."""

from __future__ import annotations

import logging

import torch

from fastserve.checkpoints.checkpoint import Checkpoint
from fastserve.checkpoints.decoder_config import DecoderConfig
from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.tensor_problems import shorten, tensor_problems

Shapes = dict[str, tuple[int, ...]]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS_AT_ONCE = 4096
"""Of two matrices that are compared."""

logger = logging.getLogger(__name__)


def has_own_head(checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Whether a checkpoint whose config ties the head to the embedding has a head of other values in `dtype`,
    which training with untied weights leaves. It is used then, as transformers does."""
    shape = checkpoint.shapes.get(EMBEDDING)
    if shape is None or HEAD not in checkpoint.shapes:
        return False
    if shape == checkpoint.shapes[HEAD] and _are_equal(EMBEDDING, HEAD, checkpoint, dtype):
        return False
    logger.warning("%s is not %s, though tie_word_embeddings is true: both are used", HEAD, EMBEDDING)
    return True


def _are_equal(one: str, other: str, checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Whether two matrices of one shape have the same numbers; they are read some rows at a time."""
    num_rows, width = checkpoint.shapes[one]
    for start in range(0, num_rows, ROWS_AT_ONCE):
        rows = range(start, min(start + ROWS_AT_ONCE, num_rows))
        parts = [torch.empty(len(rows), width, dtype=dtype) for _ in range(2)]
        for name, part in zip((one, other), parts, strict=True):
            checkpoint.read(name, part, rows)
        if not torch.equal(*parts):
            return False
    return True


def check_tensors(config: DecoderConfig, checkpoint: Checkpoint) -> None:
    """Raises ModelError if tensors are missing, misshapen or unexpected; it names them.

    Tensors that change no result are passed over, with a warning where a tool has left them.
    """
    expected, found = expected_shapes(config), checkpoint.shapes
    if config.tie_word_embeddings and EMBEDDING not in found and HEAD in found:
        expected[HEAD] = expected.pop(EMBEDDING)
    others = [name for name in found if name not in expected and not _is_redundant(name)]
    unused = [name for name in others if _is_left_by_a_tool(name) or _is_zero_bias(name, checkpoint)]
    problems = tensor_problems(
        missing=[name for name in expected if name not in found],
        misshapen=[
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
        unexpected=[name for name in others if name not in unused],
    )
    if problems:
        raise ModelError(f"the checkpoint does not fit its config: {problems}")
    if unused:
        logger.warning("tensors without a use here, left by tools of training: %s", shorten(unused))


def expected_shapes(config: DecoderConfig) -> Shapes:
    """The shape of every tensor that a checkpoint of this config has, by transformers' name."""
    shapes: Shapes = {
        EMBEDDING: (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    layer_shapes = _layer_shapes(config)
    for layer in range(config.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes.items()}
    return shapes


def _layer_shapes(config: DecoderConfig) -> Shapes:
    """The shapes of a layer's tensors, by name within the layer: `mlp.up_proj.weight`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    linears = {
        "self_attn.q_proj": (queries, hidden, config.qkv_bias),
        "self_attn.k_proj": (keys, hidden, config.qkv_bias),
        "self_attn.v_proj": (keys, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, queries, config.o_proj_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    shapes: Shapes = {f"{name}.weight": (size,) for name, size in norms.items()}
    for name, (rows, columns, has_bias) in linears.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{name}.bias"] = (rows,)
    return shapes


def _is_redundant(name: str) -> bool:
    """Whether a tensor that a checkpoint may hold follows from the others, as the head that is tied to the
    embedding, or belongs to the cache, as the scales of keys and values."""
    return name == HEAD or name.endswith(("self_attn.k_scale", "self_attn.v_scale"))


def _is_left_by_a_tool(name: str) -> bool:
    """Whether it is a table of the rotary embedding, which old versions saved, or the value head of training
    by reinforcement."""
    return ".rotary_emb." in name or name.startswith(("v_head.", "model.v_head."))


def _is_zero_bias(name: str, checkpoint: Checkpoint) -> bool:
    """Whether it is a bias of zeros: GPTQ tools write one for each linear layer, in any model."""
    weight = checkpoint.shapes.get(f"{name.removesuffix('.bias')}.weight")
    if not name.endswith(".bias") or weight is None or checkpoint.shapes[name] != weight[:1]:
        return False
    bias = torch.empty(weight[:1], dtype=torch.float32)
    checkpoint.read(name, bias)
    return not bias.any()
