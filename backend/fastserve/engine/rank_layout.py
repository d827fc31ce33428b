"""Which part of a model each rank of a replica has, and what its process is told."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from fastserve.config import Config


@dataclass(frozen=True)
class RankLayout:
    """Ranks are numbered stage by stage: the first ones are those of the first stage."""

    tensor_parallel_size: int
    pipeline_parallel_size: int

    @classmethod
    def of(cls, config: Config) -> RankLayout:
        """That of the settings."""
        return cls(config.tensor_parallel_size, config.pipeline_parallel_size)

    @property
    def world_size(self) -> int:
        """Ranks of a replica, its worker among them."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def num_slots(self) -> int:
        """Messages that a link between stages can hold: a step in flight for each stage, one that is computed
        again, and what is said between them."""
        return self.pipeline_parallel_size + 2

    def stage_of(self, rank: int) -> int:
        """The stage that a rank belongs to."""
        return rank // self.tensor_parallel_size

    def number_in_stage(self, rank: int) -> int:
        """Its place in the group of its stage; the first leads it."""
        return rank % self.tensor_parallel_size


class RankStart(msgspec.Struct, frozen=True):
    """What the process of a rank is started with."""

    rank: int
    replica: int
    config: Config
    checkpoint: str
    tokenizer: str
    leader: int
    """File descriptors from here on."""
    memory: int | None
    """Of the group of its stage, if that has several ranks."""
    previous: tuple[int, int] | None
    """Memory and socket of the link from the stage before; None as `following`: it leads no stage."""
    following: tuple[int, int] | None
