"""Low-rank weights: y = up (down x), in one launch where few tokens make a launch dear.

Layout: down [R, K] and up [N, R] as in `LowRank`, in the activations' dtype, R filled up with zeros to a
multiple of 16. Bound: with few tokens the (K + N) R numbers of the two; with many the tensor cores.

One launch: the first programs make h = down x, a tile of rows and a share of K each, and leave their sums,
[SPLITS, M, R] float32, in the L2 cache. The others make a tile of y each. They load the first of their tile
of `up` at once, so that both factors are on their way at the same time, and then wait until all of h is
there. They wait for programs of lower numbers only, which the GPU starts before them and which wait for
none: there is no deadlock, however few fit at once. What is added up is added in order; the counters end at
0.

To let each program make all of h itself would read `down` from the L2 cache N / 64 times: for rank 128 and
4096 x 4096, 64 MB in place of 1. What one launch costs is that h crosses the L2 cache within it (about 1
us), SPLITS M R 4 bytes for each tile of y; what it saves is the end of one kernel and the start of the next.
So with many tokens, where each is large, there are two launches of the same kernel, and their order is the
wait.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve_kernels.formats import LowRank
from fastserve_kernels.formats.prepared import LowRankArguments, Prepared
from fastserve_kernels.formats.weight import Weight
from fastserve_kernels.gpu.arithmetic import multiply, rounded
from fastserve_kernels.gpu.launch import Config, Launch
from fastserve_kernels.gpu.linear_call import Added, call_linear, linear_cost, random_linear, splits_for
from fastserve_kernels.gpu.operator import Cost, Operator, Shape
from fastserve_kernels.gpu.quantized_linear import check_format
from fastserve_kernels.gpu.split_k import MAX_TILES, arrivals, store_sums

_RANK_MULTIPLE = 16
_BOTH, _DOWN, _UP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _load(w, offs_n, offs_k, count, K):
    """A tile [offs_n, offs_k] of w [count, K]; 0 outside."""
    mask = (offs_n < count)[:, None] & (offs_k < K)[None, :]
    return tl.load(w + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :], mask=mask, other=0.0)


@triton.jit
def _make_hidden(
    x, down, hidden, row_tile, split, offs_m, M, K, R,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A tile of down times a share of x."""
    BLOCK_M: tl.constexpr = offs_m.shape[0]
    offs_r = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(split * steps // SPLITS, (split + 1) * steps // SPLITS):
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = (offs_k < K)[:, None] & (offs_m < M)[None, :]
        x_tile = tl.load(x + offs_m.to(tl.int64)[None, :] * K + offs_k[:, None], mask=mask, other=0.0)
        acc = multiply(_load(down, offs_r, offs_k, R, K), x_tile, acc)
    offs = (split * M + offs_m).to(tl.int64)[None, :] * R + offs_r[:, None]
    tl.store(hidden + offs, acc, mask=(offs_r < R)[:, None] & (offs_m < M)[None, :])


@triton.jit
def _load_hidden(hidden, offs_m, offs_r, M, R, dtype: tl.constexpr, SPLITS: tl.constexpr):
    """h [depth, tokens] in the activations' dtype: the shares added up in order."""
    mask = (offs_r < R)[:, None] & (offs_m < M)[None, :]
    offs = offs_m.to(tl.int64)[None, :] * R + offs_r[:, None]
    total = tl.load(hidden + offs, mask=mask, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        share = hidden + split * M.to(tl.int64) * R + offs
        total += tl.load(share, mask=mask, other=0.0, cache_modifier=".cg")
    return rounded(total, dtype)


@triton.jit(do_not_specialize=["M", "first_program"])
def low_rank(
    x, down, up, bias, residual, out, hidden, arrivals, M, N, K, R, first_program,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """hidden: [SPLITS, M, R] float32. STAGES: _BOTH, or _DOWN or _UP alone.

    Programs are numbered: those of down by tile of R, share of K and tile of tokens; then those of up, by
    tile of N and tile of tokens. Two counters of `arrivals` belong to a tile of tokens: how many of its
    programs of down, and how many of up, are done.
    """
    program = first_program + tl.program_id(0)
    token_tiles = tl.cdiv(M, BLOCK_M)
    makers = tl.cdiv(R, BLOCK_N) * SPLITS
    offs_m = (program % token_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    counter = arrivals
    if STAGES == _BOTH:
        counter += 2 * (program % token_tiles)
    number = program // token_tiles
    if number < makers:
        if STAGES != _UP:
            split, row_tile = number % SPLITS, number // SPLITS
            _make_hidden(x, down, hidden, row_tile, split, offs_m, M, K, R, BLOCK_N, BLOCK_K, SPLITS)
        if STAGES == _BOTH:
            tl.debug_barrier()  # all threads have stored before one of them says so
            tl.atomic_add(counter, 1, sem="release")
    elif STAGES != _DOWN:
        offs_n = (number - makers) * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_r = tl.arange(0, BLOCK_R)
        w = _load(up, offs_n, offs_r, N, R)
        if STAGES == _BOTH:
            while tl.atomic_add(counter, 0, sem="acquire") < makers:
                pass
            tl.debug_barrier()
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, R, BLOCK_R):
            h = _load_hidden(hidden, offs_m, start + offs_r, M, R, out.dtype.element_ty, SPLITS)
            acc = multiply(w, h, acc)
            w = _load(up, offs_n, start + BLOCK_R + offs_r, N, R)
        if STAGES == _BOTH:
            tl.debug_barrier()
            users = tl.cdiv(N, BLOCK_N)
            if tl.atomic_add(counter + 1, 1, sem="acq_rel") == users - 1:
                tl.store(counter, 0)
                tl.store(counter + 1, 0)
        store_sums(acc, out, bias, residual, None, None, offs_n, offs_m, N, M, N, 0, 0, 1)


def prepare(weight: Weight, device: torch.device, dtype: torch.dtype) -> Prepared:
    """Both factors in the activations' dtype, the rank filled up.

    Raises ValueError if it is another format, or the device cannot multiply by it.
    """
    weight = check_format(weight, LowRank, device)
    down, up = weight.down.to(device, dtype), weight.up.to(device, dtype)
    missing = -down.shape[0] % _RANK_MULTIPLE
    down, up = torch.nn.functional.pad(down, (0, 0, 0, missing)), torch.nn.functional.pad(up, (0, missing))
    arguments = (down.contiguous(), up.contiguous())
    return Prepared(weight.operator, arguments, weight.out_features, weight.in_features)


def plan(x: Tensor, weight: LowRankArguments, added: Added, out: Tensor, *, config: Config) -> list[Launch]:
    """x [M, K] and out [M, N] contiguous, of the factors' dtype."""
    (down, up), (bias, residual) = weight, added
    config = _FLOAT32 if x.dtype == torch.float32 else config
    m, n, rank = *out.shape, down.shape[0]
    constants = {name: size for name, size in config.constants.items() if name != "LAUNCHES"}
    token_tiles = -(-m // constants["BLOCK_M"])
    makers = token_tiles * -(-rank // constants["BLOCK_N"]) * constants["SPLITS"]
    users = token_tiles * -(-n // constants["BLOCK_N"])
    one = config.constants["LAUNCHES"] == 1 and 2 * token_tiles <= MAX_TILES
    arguments = {
        "x": x,
        "down": down,
        "up": up,
        "bias": bias,
        "residual": residual,
        "out": out,
        "hidden": x.new_empty(constants["SPLITS"], m, rank, dtype=torch.float32),
        "arrivals": arrivals(x.device) if one else None,
        "M": m,
        "N": n,
        "K": x.shape[1],
        "R": rank,
    }

    def launch(first: int, programs: int, stages: tl.constexpr) -> Launch:
        return Launch(
            low_rank,
            (programs,),
            {**arguments, "first_program": first},
            {**constants, "STAGES": stages.value},
            config.num_warps,
            config.num_stages,
        )

    if one:
        return [launch(0, makers + users, _BOTH)]
    return [launch(0, makers, _DOWN), launch(makers, users, _UP)]


def candidates(shape: Shape) -> list[Config]:
    """Few tokens: one launch, K split so that its tiles of down fill the GPU; many: two, and larger tiles."""
    m, steps = shape["m"], -(-shape["k"] // 128)
    block_m = next(size for size in (8, 16, 32, 64) if m <= size or size == 64)
    found = []
    if block_m <= 16:
        for block_n, block_k, stages in ((64, 128, 3), (32, 128, 3), (32, 256, 3), (64, 64, 4)):
            makers = -(-m // block_m) * -(-shape["rank"] // block_n)
            splits = min(splits_for(makers, steps, wanted=132), 64 // block_m)
            for launches in (1, 2):
                found.append(_config(block_m, block_n, block_k, splits, launches, 4, stages))
        found.append(_config(block_m, 32, 128, max(splits // 2, 1), 1, 4, 3))
    else:
        for launches in (2, 1):
            for stages in (3, 4, 2):
                found.append(_config(block_m, 64, 64, 1, launches, 4, stages))
                if m > 64:
                    found.append(_config(128, 128, 64, 1, launches, 8, stages))
    return found


def _config(
    block_m: int, block_n: int, block_k: int, splits: int, launches: int, warps: int, stages: int
) -> Config:
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_R": min(block_k, 128)}
    return Config({**sizes, "SPLITS": splits, "LAUNCHES": launches}, warps, stages)


_FLOAT32 = _config(16, 32, 32, splits=1, launches=2, warps=4, stages=1)
"""For float32, which no tensor core takes unshortened: so small that registers and shared memory suffice."""


def linear_low_rank(
    x: Tensor, weight: LowRankArguments, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """`reference.linear_low_rank` on a GPU."""
    down, up = weight
    shape = {"m": x.shape[0], "n": up.shape[0], "k": x.shape[1], "rank": down.shape[0]}
    return call_linear(OPERATORS[0], shape, x, weight, (bias, residual))


def _random(weight: Tensor, shape: Shape) -> LowRank:
    n, k = weight.shape
    factors = torch.randn(shape["rank"], n + k, dtype=weight.dtype, device=weight.device)
    return LowRank(factors[:, :k], factors[:, k:].t())


def _reference(x: Tensor, weight: LowRankArguments, *__: object) -> Tensor:
    down, up = weight
    return x.float() @ down.float().t() @ up.float().t()


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    kept = (shape["n"] + shape["k"]) * shape["rank"]
    return linear_cost(shape, dtype, kept * dtype.itemsize, kept)


OPERATORS = (
    Operator(
        name="linear_low_rank",
        inputs=random_linear(_random, prepare),
        plan=plan,
        candidates=candidates,
        cost=_cost,
        compiled_shapes=tuple({"m": m, "n": 1024, "k": 1024, "rank": 256} for m in (8, 16, 64, 128)),
        reference=_reference,
    ),
)
