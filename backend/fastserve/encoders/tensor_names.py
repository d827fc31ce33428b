"""The names of the tensors in the checkpoints of each family, as transformers saves them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TensorNames:
    """Modules of an encoder's body, without the prefix that a checkpoint with a head puts before them; each
    has a `weight`, and a `bias` where the family has one. Empty: there is no such module."""

    prefix: str
    """What the body is called in a model with a head: `bert.`."""
    word_embeddings: str
    embedding_norm: str
    layer: str
    """What comes before the names of a layer's modules, with `{}` for its number."""
    qkv_proj: tuple[str, ...]
    """Modules of the queries, the keys and the values, or one that is fused already."""
    o_proj: str
    attention_norm: str
    up_proj: str
    """Where the MLP is gated: rows of the gate, then of what it is multiplied by."""
    down_proj: str
    mlp_norm: str
    position_embeddings: str = ""
    token_type_embeddings: str = ""
    relative_bias: str = ""
    final_norm: str = ""
    pooler: str = ""
    """The dense layer that a head for sequences takes as part of the body."""
    head_dense: str = ""
    """The dense layer of a head for sequences, if that is part of the head."""
    head_norm: str = ""
    sequence_classifier: str = "classifier"
    token_head_dense: str = ""
    """The dense layer of a head for tokens."""
    token_classifier: str = "classifier"


_BERT = TensorNames(
    prefix="bert.",
    word_embeddings="embeddings.word_embeddings",
    position_embeddings="embeddings.position_embeddings",
    token_type_embeddings="embeddings.token_type_embeddings",
    embedding_norm="embeddings.LayerNorm",
    layer="encoder.layer.{}.",
    qkv_proj=("attention.self.query", "attention.self.key", "attention.self.value"),
    o_proj="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up_proj="intermediate.dense",
    down_proj="output.dense",
    mlp_norm="output.LayerNorm",
    pooler="pooler.dense",
)
_ROBERTA = replace(
    _BERT,
    prefix="roberta.",
    pooler="",
    head_dense="classifier.dense",
    sequence_classifier="classifier.out_proj",
)

TENSOR_NAMES: Mapping[str, TensorNames] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": TensorNames(
        prefix="distilbert.",
        word_embeddings="embeddings.word_embeddings",
        position_embeddings="embeddings.position_embeddings",
        embedding_norm="embeddings.LayerNorm",
        layer="transformer.layer.{}.",
        qkv_proj=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        o_proj="attention.out_lin",
        attention_norm="sa_layer_norm",
        up_proj="ffn.lin1",
        down_proj="ffn.lin2",
        mlp_norm="output_layer_norm",
        head_dense="pre_classifier",
    ),
    "mpnet": replace(
        _ROBERTA,
        prefix="mpnet.",
        token_type_embeddings="",
        qkv_proj=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        o_proj="attention.attn.o",
        attention_norm="attention.LayerNorm",
        relative_bias="encoder.relative_attention_bias",
    ),
    "modernbert": TensorNames(
        prefix="model.",
        word_embeddings="embeddings.tok_embeddings",
        embedding_norm="embeddings.norm",
        layer="layers.{}.",
        qkv_proj=("attn.Wqkv",),
        o_proj="attn.Wo",
        attention_norm="attn_norm",
        up_proj="mlp.Wi",
        down_proj="mlp.Wo",
        mlp_norm="mlp_norm",
        final_norm="final_norm",
        head_dense="head.dense",
        head_norm="head.norm",
        token_head_dense="head.dense",
    ),
}
"""By `model_type`: the families of our own encoder."""
