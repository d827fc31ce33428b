"""A decoder as the body of an embedder, as Qwen3-Embedding has it: attention is causal."""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve.encoders.ragged_batch import RaggedBatch
from fastserve.models.decoder import Decoder
from fastserve.models.kv_cache import KVCaches, make_kv_caches
from fastserve_kernels.attention_metadata import AttentionMetadata

BLOCK_SIZE = 16


class DecoderBody:
    """An `EncoderBody` over our decoder.

    Sequences are computed whole, layer by layer, so all layers share one layer's cache, which holds the
    largest batch so far. Not for two threads at once.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.hidden_size = decoder.config.hidden_size
        self.max_length = decoder.max_position
        self.dtype, self.device = decoder.dtype, decoder.device
        self._caches: KVCaches = []
        self._num_blocks = 0

    @torch.inference_mode()
    def forward(self, batch: RaggedBatch) -> Tensor:
        """The hidden states [T, hidden] of a batch, after the last norm."""
        tables: list[list[int]] = []
        num_blocks = 0
        for length in batch.lengths:
            count = -(-length // BLOCK_SIZE)
            tables.append(list(range(num_blocks, num_blocks + count)))
            num_blocks += count
        meta = AttentionMetadata.build(batch.lengths, batch.lengths, tables, BLOCK_SIZE, self.device)
        return self._decoder.forward(batch.token_ids, meta, self._caches_of(num_blocks))

    def _caches_of(self, num_blocks: int) -> KVCaches:
        if num_blocks > self._num_blocks:
            shapes = self._decoder.kv_cache_shapes(num_blocks, BLOCK_SIZE)
            self._caches = make_kv_caches(shapes[:1], self.dtype, self.device) * len(shapes)
            self._num_blocks = num_blocks
        return self._caches
