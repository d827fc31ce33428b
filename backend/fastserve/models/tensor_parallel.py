"""How a decoder is cut for several ranks that compute it together (Megatron-LM, arXiv 1909.08053).

Each rank has some of the heads, of the MLP's inner channels and of the vocabulary. The projections that make
them are column-parallel: of W [N, K] a rank has some rows. Those that take them in are row-parallel: it has
some columns, and the products are summed over the ranks. So a layer has two all-reduces, the embedding one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastserve.checkpoints.decoder_config import DecoderConfig
from fastserve.checkpoints.model_error import ModelError
from fastserve_kernels.process_group import ProcessGroup

ALIGNMENTS = (128, 64, 32)
"""Inner channels and token ids are dealt out by so many, by the first size with which all ranks get as many:
the groups of quantized weights that share a scale stay whole."""
ALIGNED = 32
"""By so many where no size does that: a smaller piece of a group has no kernel."""
MAX_RANKS = 64


@dataclass(frozen=True)
class TensorParallel:
    """What one rank has of a decoder."""

    config: DecoderConfig
    """Of the whole decoder."""
    group: ProcessGroup

    def __post_init__(self) -> None:
        check_head_counts(self.config, self.group.world_size)

    @property
    def local_config(self) -> DecoderConfig:
        """The config of this rank's part: fewer heads and inner channels; the vocabulary is the whole one."""
        return replace(
            self.config,
            num_heads=len(self._heads),
            num_kv_heads=len(self.kv_heads),
            intermediate_size=len(self.inner_channels),
        )

    @property
    def _heads(self) -> range:
        return _even_share(self.config.num_heads, self.group.rank, self.group.world_size)

    @property
    def kv_heads(self) -> range:
        """Those that this rank's heads attend to; where there are fewer than ranks, several have the same."""
        count, ranks = self.config.num_kv_heads, self.group.world_size
        if count >= ranks:
            return _even_share(count, self.group.rank, ranks)
        first = self.group.rank * count // ranks
        return range(first, first + 1)

    @property
    def attention_columns(self) -> range:
        """Of the projection after attention."""
        return _scaled(self._heads, self.config.head_dim)

    @property
    def inner_channels(self) -> range:
        """Of the MLP."""
        return _share(self.config.intermediate_size, self.group.rank, self.group.world_size)

    def vocabulary_of(self, rank: int) -> range:
        """The token ids whose embeddings and scores a rank has."""
        return _share(self.config.vocab_size, rank, self.group.world_size)

    def rows_of(self, name: str) -> range | None:
        """The rows of a tensor, by transformers' name, that this rank has; None: all."""
        module = name.rpartition(".")[0].rpartition(".")[2]
        if module == "q_proj":
            return _scaled(self._heads, self.config.head_dim)
        if module in ("k_proj", "v_proj"):
            return _scaled(self.kv_heads, self.config.head_dim)
        if module in ("gate_proj", "up_proj"):
            return self.inner_channels
        if module in ("embed_tokens", "lm_head"):
            return self.vocabulary_of(self.group.rank)
        return None


def check_head_counts(config: DecoderConfig, world_size: int) -> None:
    """Raises ModelError, with the allowed sizes, if heads cannot be dealt out evenly."""
    allowed = [size for size in range(1, MAX_RANKS + 1) if _divides(config, size)]
    if world_size not in allowed:
        raise ModelError(
            f"tensor_parallel_size: got {world_size}; allowed for {config.num_heads} heads and "
            f"{config.num_kv_heads} KV heads: {', '.join(map(str, allowed))}"
        )


def _divides(config: DecoderConfig, world_size: int) -> bool:
    kv_heads = config.num_kv_heads
    return config.num_heads % world_size == 0 and (kv_heads % world_size == 0 or world_size % kv_heads == 0)


def _even_share(count: int, rank: int, ranks: int) -> range:
    return range(count * rank // ranks, count * (rank + 1) // ranks)


def _share(count: int, rank: int, ranks: int) -> range:
    size = next((each for each in ALIGNMENTS if count % (each * ranks) == 0), None)
    if size is None:
        size = ALIGNED if count % ALIGNED == 0 and count >= ALIGNED * ranks else 1
    return _scaled(_even_share(count // size, rank, ranks), size)


def _scaled(numbers: range, size: int) -> range:
    return range(numbers.start * size, numbers.stop * size)
