"""Steps of our decoder on a CPU, recorded once for any number of tokens, then replayed.

A step calls some 240 operators. Through Python and torch each takes 5 to 7 us, which for a small model is as
long as the kernels of a decode take. A recording has none of that (see `cpu.kernels.program`).
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from fastserve.models.causal_lm import CausalLM
from fastserve.models.decoder import Decoder
from fastserve.models.kv_cache import KVCaches
from fastserve_kernels.attention_metadata import AttentionMetadata
from fastserve_kernels.cpu.recording import Arena, NotRecordableError, record
from fastserve_kernels.operator_definition import CPU_IMPLEMENTATIONS

logger = logging.getLogger(__name__)


class CapturedStep:
    """Computes steps of up to `max_num_tokens` tokens, to the last bit as `Decoder.forward`.

    Not thread-safe: all steps share their tensors.
    """

    def __init__(
        self, decoder: Decoder, kv_caches: KVCaches, max_num_tokens: int, max_blocks: int, block_size: int
    ) -> None:
        """`max_blocks`: of a sequence. The decoder has run before: what its kernels keep is there.

        Raises NotRecordableError if the format of a weight has no kernel of ours.
        """
        self.max_num_tokens = max_num_tokens
        self._decoder = decoder
        self._kv_caches = kv_caches
        self._block_size = block_size
        zeros = torch.zeros(max_num_tokens, dtype=torch.int64)
        self._embedded, self._cos, self._sin = decoder.embed(decoder.zeros(max_num_tokens), zeros)
        self._context_lens, self._slot_mapping = zeros.clone(), zeros.clone()
        self._block_tables = torch.zeros(max_num_tokens, max_blocks, dtype=torch.int64)
        self._query_start = torch.arange(max_num_tokens + 1)
        self._hidden, self.program = record(
            self._forward_static, max_num_tokens, CPU_IMPLEMENTATIONS, Arena()
        )
        """The hidden states, and what computes them."""

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, meta: AttentionMetadata) -> Tensor:
        """`Decoder.forward`; the result is good until the next call.

        What is recorded has as many sequences as tokens: those that are too many have no queries.
        """
        count, num_sequences = len(token_ids), len(meta.context_lens)
        inputs = self._decoder.embed(token_ids, meta.positions)
        for static, given in zip((self._embedded, self._cos, self._sin), inputs, strict=True):
            static[:count] = given
        self._query_start[: num_sequences + 1] = meta.query_start
        self._query_start[num_sequences + 1 : count + 1] = count
        self._context_lens[:num_sequences] = meta.context_lens
        self._slot_mapping[:count] = meta.slot_mapping
        self._block_tables[:num_sequences, : meta.block_tables.shape[1]] = meta.block_tables
        self.program.resize(count)
        self.program.run()
        return self._hidden[:count]

    def _forward_static(self, count: int) -> Tensor:
        """`Decoder.forward` of the first rows of the tensors that all steps share."""
        meta = AttentionMetadata(
            query_start=self._query_start[: count + 1],
            context_lens=self._context_lens[:count],
            block_tables=self._block_tables[:count],
            positions=self._context_lens[:count],  # which attention does not read
            slot_mapping=self._slot_mapping[:count],
            block_size=self._block_size,
        )
        inputs = (self._embedded[:count], self._cos[:count], self._sin[:count])
        return self._decoder.forward_embedded(*inputs, meta, self._kv_caches)


def capture_step(
    model: CausalLM, kv_caches: KVCaches, max_num_tokens: int, max_blocks: int, block_size: int
) -> CapturedStep | None:
    """Of a model on a CPU; None if its steps cannot be recorded."""
    if not isinstance(model, Decoder):
        return None
    try:
        return CapturedStep(model, kv_caches, max_num_tokens, max_blocks, block_size)
    except NotRecordableError as error:
        logger.info("steps are not recorded: %s", error)
        return None
