"""Falcon's attention over our paged cache: transformers has it outside of its attention interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from fastserve.checkpoints.model_error import ModelError
from fastserve.models.attention_interface import ATTENTION, CausalMask, paged_attention


class PagedFalconAttention(FalconAttention):
    """Falcon's attention over a paged cache, in all layouts of its QKV projection: one key for all heads
    (7B), one for some (40B), one for each."""

    def forward(  # type: ignore[override]  # its model calls it with our mask, and by these names
        self,
        hidden_states: Tensor,
        alibi: None,
        attention_mask: CausalMask | None,
        position_embeddings: tuple[Tensor, Tensor],
        **_: Any,
    ) -> tuple[Tensor, None]:
        """The attention output [1, T, hidden] of hidden_states [1, T, hidden]."""
        fused = self.query_key_value(hidden_states)
        # Each key and its value stand behind the queries that share them.
        heads = fused.view(*fused.shape[:2], self.num_kv_heads, -1, self.head_dim)
        query, key, value = heads[..., :-2, :].flatten(2, 3), heads[..., -2, :], heads[..., -1, :]
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attended, _none = paged_attention(self, query, key, value, attention_mask, self.inv_norm_factor)
        return self.dense(attended.flatten(2)), None


def use_paged_falcon_attention(model: PreTrainedModel) -> None:
    """Gives a Falcon model our attention, in place. Raises ModelError if it uses ALiBi."""
    if model.config.alibi:
        raise ModelError("its attention has a bias by distance (ALiBi), which paged attention has not")
    for module in model.modules():
        if isinstance(module, FalconAttention):
            module.__class__ = PagedFalconAttention
    model.config._attn_implementation = ATTENTION
