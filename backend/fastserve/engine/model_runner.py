"""From a step plan to hidden states: its token ids and block tables as tensors, and their KV cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from fastserve.checkpoints.kv_cache_scheme import KVScales
from fastserve.engine.host_kv_cache import HostKVCache
from fastserve.models.causal_lm import CausalLM
from fastserve.models.kv_cache import KVCaches, make_kv_caches, num_elements
from fastserve.scheduling.sequence import StepPlan
from fastserve_kernels.attention_metadata import AttentionMetadata

if TYPE_CHECKING:
    from fastserve.models.captured_step import CapturedStep


class ModelRunner:
    """Holds the paged KV cache of a model and runs the model over step plans."""

    def __init__(
        self,
        model: CausalLM,
        block_size: int,
        kv_cache_bytes: int,
        kv_dtype: torch.dtype,
        kv_scales: list[KVScales] | None,
        swap_space_bytes: int = 0,
    ) -> None:
        """A `kv_dtype` of 8 bits needs each layer's scales. `swap_space_bytes`: of host memory, for blocks
        that make way for others."""
        self.model = model
        self.block_size = block_size
        bytes_per_block = num_elements(model.kv_cache_shapes(1, block_size)) * kv_dtype.itemsize
        self.num_blocks = max(1, kv_cache_bytes // bytes_per_block)
        shapes = model.kv_cache_shapes(self.num_blocks, block_size)
        self.kv_caches = make_kv_caches(shapes, kv_dtype, model.device, kv_scales)
        self.host = HostKVCache(self.kv_caches, swap_space_bytes // bytes_per_block)
        one_block = model.kv_cache_shapes(1, block_size)
        self._probe_caches = make_kv_caches(one_block, kv_dtype, model.device, kv_scales)
        self._captured_step: CapturedStep | None = None
        self.on_loss: Callable[[Exception], None] = lambda error: None
        """Called, from another thread, with what has ended another rank (`RankedModelRunner`)."""

    @torch.inference_mode()
    def warm_up(self, max_captured_tokens: int) -> None:
        """Runs a prompt and a decode in blocks that nobody has yet: no request shall wait for first uses.
        Then captures steps of up to `max_captured_tokens`, if the model's can be."""
        blocks = list(range(-(-3 // self.block_size)))
        for num_tokens, context_len in ((2, 2), (1, 3)):
            self._compute_zeros(num_tokens, context_len, blocks, self.kv_caches)
        if self.model.device.type != "cpu":
            return
        from fastserve.models.captured_step import capture_step  # here: a GPU needs no numba

        max_blocks = min(self.num_blocks, -(-self.model.max_position // self.block_size))
        self._captured_step = capture_step(
            self.model, self.kv_caches, max_captured_tokens, max_blocks, self.block_size
        )

    @torch.inference_mode()
    def probe(self) -> None:
        """Computes one harmless token, in a cache of its own. Raises what the model raises if it cannot."""
        self._compute_zeros(1, 1, [0], self._probe_caches).sum().item()  # which waits for the device

    def _compute_zeros(
        self, num_tokens: int, context_len: int, blocks: list[int], kv_caches: KVCaches
    ) -> torch.Tensor:
        """The logits of the last `num_tokens` of a sequence of tokens 0."""
        metadata = AttentionMetadata.build(
            [num_tokens], [context_len], [blocks], self.block_size, self.model.device
        )
        ids = torch.zeros(num_tokens, dtype=torch.int64, device=self.model.device)
        return self.model.logits(self.model.forward(ids, metadata, kv_caches))

    def copy_blocks(self, plan: StepPlan) -> None:
        """Copies the KV blocks that the plan swaps out, then those that it swaps in."""
        self.host.copy(plan.copies_out, plan.copies_in)

    def start(self, plan: StepPlan) -> Callable[[], torch.Tensor]:
        """Begins to compute a plan, where others compute some of it; what it returns gives, once, what `run`
        does. Plans are computed, and waited for, in the order in which they are begun."""
        return partial(self.run, plan)

    def run(self, plan: StepPlan) -> torch.Tensor:
        """Computes the plan's tokens, proposed ones among them, and writes their keys and values.

        Returns the hidden states [plan.num_tokens, hidden size], in the plan's order, a sequence's proposed
        tokens behind its own; good until the next run.
        """
        return self.forward(*self.step_inputs(plan))

    def step_inputs(self, plan: StepPlan) -> tuple[torch.Tensor, AttentionMetadata]:
        """The token ids [plan.num_tokens] of a plan, and what attention is to know of them."""
        token_ids: list[int] = []
        query_lens: list[int] = []
        context_lens: list[int] = []
        for item in plan.scheduled:
            start = item.sequence.num_computed_tokens
            token_ids += item.sequence.token_ids[start : start + item.num_tokens]
            token_ids += item.proposed
            query_lens.append(item.num_tokens + len(item.proposed))
            context_lens.append(start + query_lens[-1])
        metadata = AttentionMetadata.build(
            query_lens,
            context_lens,
            [item.sequence.block_table for item in plan.scheduled],
            self.block_size,
            self.model.device,
        )
        return torch.tensor(token_ids, dtype=torch.int64, device=self.model.device), metadata

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """The hidden states [T, hidden size] of token_ids [T]; good until the next call."""
        captured = self._captured_step
        if captured is not None and len(token_ids) <= captured.max_num_tokens:
            return captured.forward(token_ids, metadata)
        return self.model.forward(token_ids, metadata, self.kv_caches)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The scores [n, vocab] float32 of the token that follows each row of `hidden` [n, hidden size]."""
        return self.model.logits(hidden)
