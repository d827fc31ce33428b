"""Paged attention on a CPU: equal pieces of work, two batched matmuls over all of them, and a merge.

The keys of a sequence are cut into *partitions* of PARTITION positions or so, counted from position 0, and
its queries of this step into *tiles*. An item is one tile against one partition. All items of a group have
the same shape, so that ragged batches need no loop over sequences and hardly any padding. Each item gives
softmax-weighted values and a log-sum-exp, and the items of a tile are merged by these (as in Flash-Decoding).

This also makes a token's result the same to the last bit whatever else is in the batch and wherever its
prompt was cut: what is added up, and in which order, depends on absolute positions alone. That takes matmuls
whose rows do not depend on the number of rows (oneDNN's of bfloat16 are so; MKL's of float32 are so for
multiples of four rows), masked probabilities that are exact zeros, and sums whose order does not change when
zeros are appended; the tests hold each of these.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PARTITION = 128
"""Keys of an item, at least: a partition is a whole number of blocks, one if blocks are larger."""
TILE = 64
"""Queries of an item, at most."""
GROUP_KEYS = 64 * 1024
"""Keys times queries of the items that are computed together, at most: bounds the memory."""
LANES = 16
"""A softmax adds up in lanes of a vector register: a partition is always in the same lane."""
UNLIMITED = 1 << 60
"""The sliding window of attention that has none."""
MASKED = -1e30
"""Absorbs any score, and a row of nothing else still has a softmax."""


class Group(NamedTuple):
    """I items of Q tiles of L queries against S keys each; a tile has at most N items."""

    query_rows: Tensor
    """[I * L] int64: rows of q; short tiles repeat their last."""
    blocks: Tensor
    """[I * blocks of a partition] int64."""
    mask: Tensor
    """[I, 1, 1, L, S] float32: 0 where the query sees the key, else MASKED."""
    merge_items: Tensor
    """[Q * W] int64: each tile's items, in places aligned to LANES partitions; any item elsewhere."""
    merge_mask: Tensor
    """[Q, W] float32: 0 in the places of items, -inf elsewhere. W is at least LANES."""
    value_items: Tensor
    """[Q * N] int64: merge_items without the columns at the end that hold no item of any tile."""


def plan(
    query_start: Tensor, context_lens: Tensor, block_tables: Tensor, block_size: int, window: int | None
) -> list[Tensor]:
    """The work of a step, as a flat list because that is what an operator can take.

    First [T] int64: where each token's result lies among those of all groups, or an empty tensor if they are
    in order. Then the fields of the groups, one after the other.
    """
    start = query_start.numpy()
    context = context_lens.numpy()
    query = np.diff(start)
    groups: list[Tensor] = []
    places = np.empty(start[-1], dtype=np.int64)
    computed = 0
    for members, tile_len in _by_tile_length(query):
        count = -(-query[members] // tile_len)
        sequence = np.repeat(members, count)
        offset = tile_len * (np.arange(len(sequence)) - np.repeat(np.cumsum(count) - count, count))
        tiles = _Tiles(sequence, offset, tile_len, query, context, start)
        rows = tiles.first_row[:, None] + np.arange(tile_len)
        inside = np.arange(tile_len) < tiles.length[:, None]
        places[rows[inside]] = computed + np.flatnonzero(inside)
        computed += rows.size
        groups += tiles.groups(block_tables.numpy(), block_size, UNLIMITED if window is None else window)
    in_order = computed == len(places) and (places == np.arange(computed)).all()
    return [torch.from_numpy(places[:0] if in_order else places), *groups]


def _by_tile_length(query: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Sequences and their tile length: single tokens in tiles of one, all others in a common one."""
    single = np.flatnonzero(query == 1)
    several = np.flatnonzero(query > 1)
    longest = int(query.max(initial=1))
    tile_len = min(TILE, 1 << (longest - 1).bit_length())
    return [(members, length) for members, length in ((single, 1), (several, tile_len)) if len(members)]


class _Tiles:
    """Tiles of one length: where they lie in the batch and in their sequences."""

    def __init__(
        self,
        sequence: np.ndarray,
        offset: np.ndarray,
        tile_len: int,
        query: np.ndarray,
        context: np.ndarray,
        start: np.ndarray,
    ) -> None:
        self.sequence = sequence
        self.tile_len = tile_len
        self.length = np.minimum(tile_len, query[sequence] - offset)
        self.first_row = start[sequence] + offset
        self.first_position = (context - query)[sequence] + offset
        self.last_position = self.first_position + self.length - 1

    def groups(self, block_tables: np.ndarray, block_size: int, reach: int) -> list[Tensor]:
        """The fields of all groups: each has as many tiles as fit into GROUP_KEYS, one at least."""
        blocks_per_partition = max(1, PARTITION // block_size)
        partition = blocks_per_partition * block_size
        first = np.maximum(0, self.first_position - reach + 1) // partition
        count = self.last_position // partition + 1 - first
        limit = max(1, GROUP_KEYS // (partition * self.tile_len))
        padding = -block_tables.shape[1] % blocks_per_partition
        tables = np.pad(block_tables, ((0, 0), (0, padding))).reshape(
            len(block_tables), -1, blocks_per_partition
        )
        flat: list[Tensor] = []
        begin = 0
        while begin < len(count):
            fits = int(np.searchsorted(np.cumsum(count[begin:]), limit, side="right"))
            end = begin + max(1, fits)
            flat += self._group(
                slice(begin, end), first[begin:end], count[begin:end], tables, partition, reach
            )
            begin = end
        return flat

    def _group(
        self,
        members: slice,
        first: np.ndarray,
        count: np.ndarray,
        tables: np.ndarray,
        partition: int,
        reach: int,
    ) -> Group:
        """The group of some tiles, with the first partition of each and how many it meets.

        tables: [sequences, partitions, blocks of a partition].
        """
        item_start = np.cumsum(count) - count
        tile = np.repeat(np.arange(len(count)), count)
        index = first[tile] + np.arange(len(tile)) - item_start[tile]
        within = np.minimum(np.arange(self.tile_len), self.length[members][:, None] - 1)
        rows = self.first_row[members][:, None] + within
        query_position = (self.first_position[members][:, None] + within)[tile][:, :, None]
        key_position = (index[:, None] * partition + np.arange(partition))[:, None, :]
        seen = (key_position <= query_position) & (key_position > query_position - reach)
        mask = np.where(seen, np.float32(0), np.float32(MASKED))
        place = first % LANES
        used = int((place + count).max())
        column = np.arange(max(LANES, used))
        real = (column >= place[:, None]) & (column < (place + count)[:, None])
        merge = np.where(real, (item_start - place)[:, None] + column, item_start[:, None])
        merge_mask = np.where(real, np.float32(0), np.float32(-np.inf))
        return Group(
            torch.from_numpy(rows[tile].ravel()),
            torch.from_numpy(tables[self.sequence[members][tile], index].ravel()),
            torch.from_numpy(mask[:, None, None]),
            torch.from_numpy(merge.ravel()),
            torch.from_numpy(merge_mask),
            torch.from_numpy(merge[:, :used].ravel()),
        )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    work: list[Tensor],
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """`ops.paged_attention`; `work` is `plan` of the same batch and window."""
    if not len(q):
        return q.new_empty(0, q.shape[1], v_cache.shape[3])
    places, fields = work[0], len(Group._fields)
    parts = [
        _attend(q, k_cache, v_cache, Group(*work[i : i + fields]), scale, softcap)
        for i in range(1, len(work), fields)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.index_select(0, places) if len(places) else out


def _attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, group: Group, scale: float, softcap: float | None
) -> Tensor:
    """[Q * L, H, Dv]: the attention of all queries of a group."""
    items, _, _, queries, keys = group.mask.shape
    heads, dim = q.shape[1:]
    kv_heads, dim_v = v_cache.shape[2:]
    rows = heads // kv_heads * queries
    grouped = q.index_select(0, group.query_rows)
    if queries > 1:
        grouped = grouped.view(items, queries, heads, dim).transpose(1, 2)
    grouped = grouped.reshape(items * kv_heads, rows, dim)
    if q.dtype == torch.float32 and rows % 4:
        grouped = torch.nn.functional.pad(grouped, (0, 0, 0, -rows % 4))
    scores = torch.bmm(grouped, _gather(k_cache, group.blocks, items, keys).transpose(1, 2))
    if softcap is not None:
        scores = torch.tanh(scores.float() * (scale / softcap))
        scale = softcap
    scores = scores.view(items, kv_heads, -1, queries, keys)
    scores = torch.add(group.mask, scores, alpha=scale)
    probabilities = scores.softmax(-1)
    values = torch.bmm(
        probabilities.to(q.dtype).view(items * kv_heads, -1, keys),
        _gather(v_cache, group.blocks, items, keys),
    )
    values = values.view(items, kv_heads, -1, dim_v)[:, :, :rows]
    tiles, places = group.merge_mask.shape
    if items > tiles:
        peak = scores.amax(-1)
        lse = peak.sub_(probabilities.amax(-1).log_()).view(items, kv_heads, -1)[:, :, :rows]
        lse = lse.index_select(0, group.merge_items).view(tiles, places, kv_heads * rows).transpose(1, 2)
        weights = torch.add(lse, group.merge_mask.unsqueeze(1)).softmax(-1)
        values = values.index_select(0, group.value_items).view(tiles, -1, kv_heads * rows, dim_v)
        weights = weights[:, :, : values.shape[1]].transpose(1, 2).unsqueeze(-1)
        values = (weights * values).sum(1).to(q.dtype)
    if queries > 1:
        values = values.view(tiles, heads, queries, dim_v).transpose(1, 2)
    return values.reshape(tiles * queries, heads, dim_v)


def _gather(cache: Tensor, blocks: Tensor, items: int, keys: int) -> Tensor:
    """[items * kv_heads, keys, dim]: whole blocks copied, then sorted by head."""
    kv_heads, dim = cache.shape[2:]
    taken = cache.index_select(0, blocks).view(items, keys, kv_heads, dim)
    return taken.transpose(1, 2).reshape(items * kv_heads, keys, dim)
