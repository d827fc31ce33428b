"""Which configs are worth trying for a product with weights of few bits, the most promising first."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastserve_kernels.gpu.fragments import ROWS, WORDS, block_columns, blocks_of
from fastserve_kernels.gpu.launch import Config
from fastserve_kernels.gpu.operator import Shape
from fastserve_kernels.gpu.split_k import MAX_TILES

MOST = 24
"""Candidates for a shape."""
MULTIPROCESSORS = 132
SHARED_BYTES = 160 * 1024
"""Shared memory that a program may take, on an A100 too."""
SHARED_BYTES_OF_MULTIPROCESSOR = 227 * 1024
WARPS_OF_MULTIPROCESSOR = 32
"""Warps whose threads have 64 registers or more."""
BYTES_ON_THEIR_WAY = 40 * 1024
"""Bytes of codes per multiprocessor that keep the memory busy: its rate times its latency."""
L2_COST = 0.25
"""The cost of a byte from the L2 cache, in bytes from memory."""
SPLIT_COST = 0.1
"""The cost of waiting for the other programs of a tile, as a share of the product's time."""
MAX_SUMS = 64
"""Registers of a thread that may be sums."""
MIN_TURNS = 4
"""Warps that share K even if there is no block of columns for each."""
FEW_TOKENS = 16
"""Up to which the warps of a program may share K."""
MANY_TOKENS = 64
"""Beyond which the product is bound by the tensor cores."""


def candidates(shape: Shape, bits: int) -> list[Config]:
    """For the sizes m, n, k: at most `MOST`."""
    tokens = shape["m"]
    if tokens > MANY_TOKENS:
        tried = list(_many_tokens())
    else:
        tried = [*_shared_k(shape)] if tokens <= 2 * FEW_TOKENS else []
        tried += _shared_rows(shape) if tokens > FEW_TOKENS // 2 else []
    tried = [
        config
        for config in tried
        if _shared_bytes(config, bits) <= SHARED_BYTES and _splits_well(config, shape, bits)
    ]
    return sorted(tried, key=lambda config: -_promise(config, shape, bits))[:MOST]


def _config(
    rows: int, tokens: int, k_warps: int, splits: int, scaled: int, warps: int, stages: int
) -> Config:
    sizes = {
        "ROW_BLOCKS": rows,
        "BLOCK_M": tokens,
        "K_WARPS": k_warps,
        "SPLITS": splits,
        "SCALED_WEIGHTS": scaled,
    }
    return Config(sizes, warps, stages)


def _shared_k(shape: Shape) -> Iterator[Config]:
    """Warps that take turns at blocks of columns."""
    tokens = max(8, 1 << (shape["m"] - 1).bit_length())
    for rows, warps in ((1, 8), (2, 4), (2, 8), (4, 4), (4, 8), (1, 16), (2, 16)):
        for splits in (1, 2, 4):
            for stages in (3, 4):
                yield _config(rows, tokens, warps, splits, 0, warps, stages)


def _shared_rows(shape: Shape) -> Iterator[Config]:
    """Warps that share the rows of a tile, for up to `MANY_TOKENS`."""
    tokens = max(16, 1 << (shape["m"] - 1).bit_length())
    for rows, warps in ((4, 4), (8, 4), (8, 8), (16, 8)):
        for splits in (1, 2, 4, 8):
            for stages in (3, 4):
                for scaled in (0, 1) if tokens > FEW_TOKENS and shape["group_size"] < shape["k"] else (0,):
                    yield _config(rows, tokens, 0, splits, scaled, warps, stages)


def _many_tokens() -> Iterator[Config]:
    for rows, tokens, warps in ((8, 128, 8), (8, 64, 8), (4, 128, 4), (16, 64, 8), (8, 64, 4)):
        for splits in (1, 2, 4):
            for stages in (3, 4):
                yield _config(rows, tokens, 0, splits, 1, warps, stages)


def _block_bytes(config: Config, bits: int) -> tuple[int, int]:
    """The bytes of (codes, x) that a program reads in a step."""
    sizes = config.constants
    turns = max(sizes["K_WARPS"], 1)
    return turns * sizes["ROW_BLOCKS"] * WORDS * 2, turns * sizes["BLOCK_M"] * block_columns(bits) * 2


def _shared_bytes(config: Config, bits: int) -> int:
    """wgmma reads x where it lies, which takes one buffer more."""
    codes, x = _block_bytes(config, bits)
    return (config.num_stages - 1) * codes + (config.num_stages - (config.constants["K_WARPS"] > 0)) * x


def _tiles(config: Config, shape: Shape) -> int:
    sizes = config.constants
    return blocks_of(shape["n"], ROWS * sizes["ROW_BLOCKS"]) * blocks_of(shape["m"], sizes["BLOCK_M"])


def _splits_well(config: Config, shape: Shape, bits: int) -> bool:
    """Whether K has work for all, and splitting it is of use and possible."""
    splits, turns = config.constants["SPLITS"], max(config.constants["K_WARPS"], 1)
    tiles = _tiles(config, shape)
    blocks = blocks_of(shape["k"], block_columns(bits))
    useful = splits == 1 or (tiles * splits <= 4 * MULTIPROCESSORS and tiles <= MAX_TILES)
    return useful and _sums_fit(config) and (blocks >= splits * turns or (splits == 1 and turns <= MIN_TURNS))


def _sums_fit(config: Config) -> bool:
    """Whether the sums of a tile and of a group leave registers, also where those of others are added up."""
    sizes = config.constants
    sums = ROWS * sizes["ROW_BLOCKS"] * sizes["BLOCK_M"] * max(sizes["K_WARPS"], 1) / (32 * config.num_warps)
    most = MAX_SUMS if sizes["SPLITS"] == 1 else MAX_SUMS // 2
    return sums * (1 if sizes["SCALED_WEIGHTS"] else 2) <= most


def _promise(config: Config, shape: Shape, bits: int) -> float:
    """Grows with the share of the memory's rate, or with many tokens the tensor cores', that it may reach."""
    sizes = config.constants
    codes, x = _block_bytes(config, bits)
    programs = _tiles(config, shape) * sizes["SPLITS"]
    resident = max(1, min(
        SHARED_BYTES_OF_MULTIPROCESSOR // (_shared_bytes(config, bits) + 2048),
        WARPS_OF_MULTIPROCESSOR // config.num_warps,
    ))  # fmt: skip
    places = MULTIPROCESSORS * min(resident, math.ceil(programs / MULTIPROCESSORS))
    busy = programs / (math.ceil(programs / places) * places)
    if shape["m"] > MANY_TOKENS:
        tile = ROWS * sizes["ROW_BLOCKS"] * sizes["BLOCK_M"]
        return busy * math.sqrt(tile) / (1.0 if sizes["SPLITS"] == 1 else 1.0 + SPLIT_COST)
    on_their_way = places / MULTIPROCESSORS * (config.num_stages - 1) * codes
    # what comes from the L2 cache: x, again for every row tile, and the sums of programs that share K
    cached = min(1.0, shape["m"] / sizes["BLOCK_M"]) * x / codes
    if sizes["SPLITS"] > 1:
        cached += 8 * sizes["SPLITS"] * shape["m"] / (shape["k"] * bits / 8)
    cost = 1 + L2_COST * cached + (SPLIT_COST if sizes["SPLITS"] > 1 else 0.0)
    return busy * min(1.0, on_their_way / BYTES_ON_THEIR_WAY) / cost
