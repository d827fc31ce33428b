"""The CPU's operators against torch's own: linears of every format, and batched paged attention.

Weights lie in so many copies that none is still in the last-level cache when its turn comes again. The
contestants take turns within each repetition.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastserve_kernels import formats, ops
from fastserve_kernels.attention_metadata import AttentionMetadata
from fastserve_kernels.bench.calls import Call, on_each
from fastserve_kernels.bench.report import Ceilings, Row, row
from fastserve_kernels.bench.shapes import MODELS, group_size_for, model_named
from fastserve_kernels.bench.statistics import Samples
from fastserve_kernels.cpu.kernels.huge_pages import in_huge_pages
from fastserve_kernels.cpu.kernels.packing import PANEL_ROWS
from fastserve_kernels.formats.prepared import Prepared
from fastserve_kernels.formats.weight import Weight
from fastserve_kernels.gpu.operator import Cost
from fastserve_kernels.kv_cache import KVCache
from fastserve_kernels.preparation import prepare

DTYPE = torch.bfloat16
ROWS = (1, 4, 16, 64)
LARGE = {"up": (8192, 2048), "down": (2048, 8192)}
"""(N, K) of weights that exceed the caches by themselves."""
COLD_CACHES = 2
"""How many times the last-level cache the copies fill together."""
CACHE_WHERE_UNKNOWN = 64 << 20
SAMPLE_SECONDS = 4e-3
REPETITIONS = 15
BASELINE = "oneDNN bf16"
ATTENTION = "paged_attention"
READING = "reading"

Format = Callable[[Tensor], Weight]

FORMATS: Mapping[str, Format] = {
    "int4": lambda weight: formats.Int4.pack(weight, group_size_for("linear_int4", weight.shape[1])),
    "int8": formats.Int8.pack,
    "int_rows": lambda weight: formats.IntRows.pack(
        weight, _mostly_four(len(weight)), group_size_for("linear_int4", weight.shape[1]), symmetric=False
    ),
    "nf4": lambda weight: formats.NF4.pack(weight, group_size_for("linear_nf4", weight.shape[1])),
    "fp8": formats.FP8.pack,
    "w8a8": formats.W8A8.pack,
    "sparse24": formats.Sparse24.pack,
    "sparse24_int4": lambda weight: formats.Sparse24Int4.pack(
        weight, group_size_for("linear_int4", weight.shape[1])
    ),
    "block_sparse": lambda weight: formats.BlockSparse.pack(weight, (32, 32), 0.5),
    "bitmap": lambda weight: formats.Bitmap.pack(weight, density=0.5),
    "low_rank": lambda weight: _low_rank(weight, -(-min(weight.shape) // (8 * PANEL_ROWS)) * PANEL_ROWS),
}
"""A weight [N, K] in each format."""


def _mostly_four(rows: int) -> Tensor:
    """Bits of rows as `mixed_precision` deals them out at 4 on average: one in eight has 3, as many 5."""
    return torch.tensor([4, 4, 3, 4, 4, 4, 5, 4], dtype=torch.uint8).repeat(rows // 8 + 1)[:rows]


def _low_rank(weight: Tensor, rank: int) -> formats.LowRank:
    """Any weight of that rank: a decomposition takes long, and changes no time. The rank is of whole panels:
    a copy lacks what would fill up the last one."""
    return formats.LowRank(weight[:rank].contiguous(), weight[:, :rank].contiguous())


def measure(contestants: Mapping[str, Sequence[Call]], repetitions: int) -> dict[str, Samples]:
    """Seconds of one call of each contestant, who take turns; each goes round its calls, one per copy.

    The first call of a turn is not timed: it pays for what the contestant before it left in the caches."""
    endless = {name: itertools.cycle(calls) for name, calls in contestants.items()}
    counts = {name: _calls_per_sample(calls) for name, calls in endless.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repetitions):
        for name, calls in endless.items():
            next(calls)()
            start = time.perf_counter()
            for _ in range(counts[name]):
                next(calls)()
            seconds[name].append((time.perf_counter() - start) / counts[name])
    return {name: Samples(tuple(taken)) for name, taken in seconds.items()}


def _calls_per_sample(calls: itertools.cycle[Call]) -> int:
    """The calls that fill a sample's time; the first, slower calls are made here."""
    for _ in range(2):
        next(calls)()
    start = time.perf_counter()
    next(calls)()
    return max(1, math.ceil(SAMPLE_SECONDS / (time.perf_counter() - start)))


def ceilings() -> Ceilings:
    """The rates of reading, and of bfloat16 products of matrices 2048 wide."""
    side = 2048
    a, b = (torch.randn(side, side, dtype=DTYPE) for _ in range(2))
    times = measure({READING: [_much().sum], "product": [lambda: a @ b]}, repetitions=5)
    return Ceilings(_much().nbytes / times[READING].median, 2 * side**3 / times["product"].median)


def _with_reading(
    contestants: Mapping[str, Sequence[Call]], machine: Ceilings
) -> tuple[dict[str, Samples], Ceilings]:
    """The times, and the bandwidth of reading as it was between them: other guests of a host change it."""
    times = measure({**contestants, READING: [_much().sum]}, REPETITIONS)
    reading = times.pop(READING)
    return times, dataclasses.replace(machine, bytes_per_second=_much().nbytes / reading.median)


@functools.cache
def _much() -> Tensor:
    """512 MB, which torch adds up as fast as it reads them, in the pages that read fastest."""
    return in_huge_pages(torch.rand(1 << 27))


def cache_bytes() -> int:
    """Bytes of the largest cache of the first processor, as Linux says."""
    sizes = [
        int(path.read_text().strip().removesuffix("K")) * 1024
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=CACHE_WHERE_UNKNOWN)


def chosen(names: Sequence[str]) -> list[str]:
    """The formats of these names, or "paged_attention"; all if none is named.

    Raises ValueError for another name.
    """
    known = [*FORMATS, ATTENTION]
    for name in names:
        if name not in known:
            raise ValueError(f"operator {name!r}: none of this name on a CPU; there are {', '.join(known)}")
    return list(names) or known


def parts(shapes: Sequence[str]) -> dict[tuple[str, str], tuple[int, int]]:
    """(N, K) by model, or "large", and linear layer. Raises ValueError for another name."""
    return {
        (name, part): size
        for name in shapes
        for part, size in (LARGE if name == "large" else model_named(name).linears).items()
    }


def measured(
    names: Sequence[str],
    sizes: Mapping[tuple[str, str], tuple[int, int]],
    rows: Sequence[int],
    machine: Ceilings,
) -> Iterator[Row]:
    """A row for each of the names that `chosen` gives, for each of the sizes that `parts` does."""
    packs = {name: FORMATS[name] for name in names if name in FORMATS}
    for place, (n, k) in sizes.items() if packs else ():
        yield from _linears(packs, place, torch.randn(n, k, dtype=DTYPE) * k**-0.5, rows, machine)
    if ATTENTION in names:
        yield attention(machine)


def _linears(
    packs: Mapping[str, Format],
    place: tuple[str, str],
    weight: Tensor,
    rows: Sequence[int],
    machine: Ceilings,
) -> Iterator[Row]:
    """Each format of a weight, against oneDNN's bfloat16 and torch's own kernels of few bits."""
    n, k = weight.shape
    prepared = {name: _copies(prepare(pack(weight), "cpu", DTYPE)) for name, pack in packs.items()}
    dense = _copies(prepare(formats.Dense(weight), "cpu", DTYPE))
    for m in rows:
        x = torch.randn(m, k, dtype=DTYPE)
        ours = {name: _linear_calls(x, copies) for name, copies in prepared.items()}
        peers = {BASELINE: _linear_calls(x, dense), **_torch_peers(x, weight)}
        times, now = _with_reading({**ours, **peers}, machine)
        for name, copies in prepared.items():
            cost = Cost(_bytes_of(copies[0]) + m * (n + k) * x.element_size(), 2 * m * n * k)
            others = {peer: times[peer] for peer in peers}
            yield row(name, place, {"m": m, "n": n, "k": k}, cost, times[name], others, now)


def _bytes_of(prepared: Prepared) -> int:
    return sum(
        argument.numel() * argument.element_size()
        for argument in prepared.arguments
        if isinstance(argument, Tensor)
    )


def count_for(nbytes: int) -> int:
    """Copies of nbytes each that exceed the last-level cache several times, at least 2."""
    return max(2, math.ceil(COLD_CACHES * cache_bytes() / nbytes) + 1)


def _copies(prepared: Prepared) -> list[Prepared]:
    """Enough of them at other addresses to fill the last-level cache several times."""
    return [prepared] + [
        dataclasses.replace(
            prepared, arguments=tuple(_copy(a) if isinstance(a, Tensor) else a for a in prepared.arguments)
        )
        for _ in range(count_for(_bytes_of(prepared)) - 1)
    ]


def _copy(argument: Tensor) -> Tensor:
    """In such pages as `prepare` puts it; oneDNN's own layout is for oneDNN to place."""
    return argument.clone() if argument.is_mkldnn else in_huge_pages(argument)


def _linear_calls(x: Tensor, copies: Sequence[Prepared]) -> list[Call]:
    return on_each(lambda weight: ops.linear(x, weight), copies)


def _torch_peers(x: Tensor, weight: Tensor) -> dict[str, list[Call]]:
    """torch's kernels for eight and four bits."""
    n, k = weight.shape
    group = group_size_for("linear_int4", k)
    values = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scales = torch.rand(n, dtype=DTYPE)
    codes = torch.randint(16, (n, k), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    pairs = torch.rand(k // group, n, 2, dtype=DTYPE)
    eight = [values.clone() for _ in range(count_for(values.nbytes))]
    four = [packed.clone() for _ in range(count_for(packed.nbytes))]
    return {
        "torch int8": on_each(lambda w: torch._weight_int8pack_mm(x, w, scales), eight),
        "torch int4": on_each(lambda w: torch._weight_int4pack_mm_for_cpu(x, w, group, pairs), four),
    }


def attention(machine: Ceilings, sequences: int = 16, context: int = 512) -> Row:
    """One step of decoding with SmolLM2's heads, against two loops of scaled_dot_product_attention: one is
    given each sequence's keys and values in one piece, the other gathers them from their blocks."""
    model, block_size = MODELS["smollm2"], 16
    blocks = sequences * context // block_size
    tables = (torch.randperm(blocks) + 1).view(sequences, -1)
    meta = AttentionMetadata.build([1] * sequences, [context] * sequences, tables.tolist(), block_size, "cpu")
    sizes = (blocks + 1, block_size, model.kv_heads, model.head_dim)
    nbytes = 2 * sequences * context * model.kv_heads * model.head_dim * DTYPE.itemsize
    caches = [
        KVCache(torch.randn(sizes).to(DTYPE), torch.randn(sizes).to(DTYPE)) for _ in range(count_for(nbytes))
    ]
    q = torch.randn(sequences, model.heads, model.head_dim, dtype=DTYPE)
    scale = model.head_dim**-0.5

    def gather(cache: Tensor, sequence: int) -> Tensor:
        return cache[tables[sequence]].flatten(0, 1).transpose(0, 1)[None]

    whole = [
        [(gather(cache.keys, i).contiguous(), gather(cache.values, i).contiguous()) for i in range(sequences)]
        for cache in caches
    ]

    def attend(i: int, k: Tensor, v: Tensor) -> Tensor:
        query = q[i, :, None][None]
        return torch.nn.functional.scaled_dot_product_attention(query, k, v, scale=scale, enable_gqa=True)

    def gathering(k: Tensor, v: Tensor) -> list[Tensor]:
        return [attend(i, gather(k, i), gather(v, i)) for i in range(sequences)]

    times, now = _with_reading(
        {
            "ours": on_each(lambda cache: ops.paged_attention(q, cache, meta, scale), caches),
            "loop of SDPA": on_each(lambda kv: [attend(i, *pair) for i, pair in enumerate(kv)], whole),
            "loop of SDPA, gathered": on_each(lambda cache: gathering(cache.keys, cache.values), caches),
        },
        machine,
    )
    cost = Cost(nbytes + 2 * q.nbytes, 4 * sequences * context * model.heads * model.head_dim)
    shape = {"batch": sequences, "context": context}
    ours = times.pop("ours")
    return row(ATTENTION, ("smollm2", ""), shape, cost, ours, times, now)
