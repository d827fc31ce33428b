"""Loads a checkpoint into a `Decoder`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fastserve import heap
from fastserve.checkpoints.checkpoint import Checkpoint
from fastserve.checkpoints.decoder_config import DecoderConfig
from fastserve.checkpoints.online_quantization import quantize_head
from fastserve.checkpoints.sharded_checkpoint import ShardedCheckpoint
from fastserve.models.decoder import Decoder, DecoderLayer, DecoderWeights, EmbeddingTable
from fastserve.models.decoder_tensors import EMBEDDING, HEAD, check_tensors, has_own_head
from fastserve.models.lazy_weights import LazyEmbedding, LazyLayers
from fastserve.models.linear import AnyLinear, ParallelLMHead, RowParallelLinear, VocabParallelEmbedding
from fastserve.models.linear_reader import LinearReader
from fastserve.models.pipeline_stage import PipelineStage, make_stage
from fastserve.models.tensor_parallel import TensorParallel
from fastserve_kernels.process_group import ProcessGroup


def load_decoder(
    config: DecoderConfig,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    max_position: int,
    quantization: str,
    quantizes_activations: Callable[[], bool],
    one_layer_at_a_time: bool = False,
    group: ProcessGroup | None = None,
    stage: tuple[int, int] = (0, 1),
) -> Decoder:
    """A decoder in `dtype` on `device`, for sequences of up to `max_position` tokens.

    `group`: of the ranks that have a part of it each; None: it is whole. `stage`: which of how many, by
    layers, it is.

    `quantizes_activations`: see `prepare`; it is asked if a weight can have them so. `quantization` and
    `one_layer_at_a_time` are those of `load_model`. Raises ModelError if tensors are missing, misshapen or
    unexpected; it names them.
    """
    if config.tie_word_embeddings and has_own_head(checkpoint, dtype):
        config = replace(config, tie_word_embeddings=False)
    check_tensors(config, checkpoint)
    pipeline_stage = make_stage(config, *stage) if stage[1] > 1 else None
    if pipeline_stage is not None:
        layers = pipeline_stage.layers
        config = replace(config, sliding_windows=config.sliding_windows[layers.start : layers.stop])
    parallel = None
    if group is not None:
        parallel = TensorParallel(config, group)
        config, checkpoint = parallel.local_config, ShardedCheckpoint(checkpoint, parallel.rows_of)
    reader = LinearReader(checkpoint, dtype, device, quantization, quantizes_activations)
    weights = _WeightLoader(config, reader, parallel, pipeline_stage).load(one_layer_at_a_time)
    return Decoder(config, weights, max_position, parallel, pipeline_stage)


@dataclass(frozen=True)
class _WeightLoader:
    """Loads the weights of a decoder, whose tensors are known to be there."""

    config: DecoderConfig
    reader: LinearReader
    parallel: TensorParallel | None
    stage: PipelineStage | None

    @property
    def _embedding_name(self) -> str:
        """A tool that stores tied tensors once may keep either of them."""
        return EMBEDDING if EMBEDDING in self.reader.checkpoint.shapes else HEAD

    def load(self, one_layer_at_a_time: bool) -> DecoderWeights:
        has_ends = self.stage is None or self.stage.is_first
        layers = LazyLayers(self._layer, self.config.num_layers)
        head = (self._embedding_name if self.config.tie_word_embeddings else HEAD).removesuffix(".weight")
        # The largest first: to be packed takes several times its bytes, which lie on top of what is there.
        lm_head = self._head(head) if has_ends else None
        heap.trim()
        return DecoderWeights(
            embedding=self._embedding(one_layer_at_a_time) if has_ends else None,
            layers=layers if one_layer_at_a_time else list(layers),
            final_norm=self.reader.fused("model.norm.weight"),
            lm_head=lm_head,
        )

    def _head(self, name: str) -> AnyLinear:
        local, parallel = self.reader.linear(False, name, quantize=quantize_head), self.parallel
        if parallel is None:
            return local
        widths = [len(parallel.vocabulary_of(rank)) for rank in range(parallel.group.world_size)]
        return ParallelLMHead(local, parallel.group, widths)

    def _embedding(self, is_lazy: bool) -> EmbeddingTable:
        if is_lazy:
            return LazyEmbedding(lambda: self._embedding(False))
        local, parallel = self.reader.fused(self._embedding_name), self.parallel
        if parallel is None:
            return local
        first = parallel.vocabulary_of(parallel.group.rank).start
        return VocabParallelEmbedding(local, first, parallel.group)

    def _row_parallel(self, has_bias: bool, name: str, columns: range | None) -> AnyLinear:
        """`columns`: of this rank; rank 0 alone adds the bias."""
        if self.parallel is None or columns is None:
            return self.reader.linear(has_bias, name)
        group = self.parallel.group
        local = self.reader.linear(has_bias and group.rank == 0, name, columns=columns)
        return RowParallelLinear(local, group)

    def _layer(self, index: int) -> DecoderLayer:
        first = 0 if self.stage is None else self.stage.layers.start
        config, prefix = self.config, f"model.layers.{first + index}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        fused, linear, parallel = self.reader.fused, self.reader.linear, self.parallel
        heads = None if parallel is None else parallel.attention_columns
        inner = None if parallel is None else parallel.inner_channels
        return DecoderLayer(
            input_layernorm=fused(f"{prefix}input_layernorm.weight"),
            qkv_proj=linear(config.qkv_bias, *(f"{attention}{name}_proj" for name in "qkv")),
            q_norm=fused(f"{attention}q_norm.weight") if config.qk_norm else None,
            k_norm=fused(f"{attention}k_norm.weight") if config.qk_norm else None,
            o_proj=self._row_parallel(config.o_proj_bias, f"{attention}o_proj", heads),
            post_attention_layernorm=fused(f"{prefix}post_attention_layernorm.weight"),
            gate_up_proj=linear(config.mlp_bias, f"{mlp}gate_proj", f"{mlp}up_proj"),
            down_proj=self._row_parallel(config.mlp_bias, f"{mlp}down_proj", inner),
            sliding_window=config.sliding_windows[index],
        )
