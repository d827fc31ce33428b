"""The kernels of sampling: they find a token by its place among the likeliest without sorting the vocabulary.

Tokens are ordered by one whole number each, their *order*: the bits of the scaled logit, arranged so that
they compare as it does, above the complement of the id. Their weights exp(logit - largest), in units of
2**-40, are whole numbers too. So sums do not depend on how they are added up, and the first token at which
the weights, summed from the likeliest down, exceed a target is found by bisection over orders, where each
step sums what lies above the middle: no ties, no rounding that contradicts itself, the same result whatever
ran when. It ends as soon as one token is left between the bounds: for n tokens little over log2(n) steps.

A row is read twice. `summarise` takes the largest of each GROUP tokens, its leader, and the sum of each
chunk; from the leaders, which are some tokens of the row, `bound` finds a logit that no token which is kept
lies below; `gather` lists the orders of the few tokens above it, and takes the exact weight of each chunk.
`draw` searches the list, which lies in the cache nearest to the processor unless the distribution is flat and
almost all of it is kept.

Bound: the bytes of the logits twice, of which the second reading mostly meets the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(128)
UNIT = tl.constexpr(float(2**40))
"""The fixed-point unit of weights: 2**20 of them stay below 2**63."""
ID_BITS = tl.constexpr(20)
IDS = tl.constexpr(1 << 20)
NONE = tl.constexpr(-(1 << 62))
"""Below any order."""
MIN_TEMPERATURE = tl.constexpr(1e-5)
MARGIN = tl.constexpr(1e-4)
"""How far bounds that were computed in float32 are moved to the safe side."""


@triton.jit
def _divisor(temperature, row):
    """What logits are divided by; greedy rows are not scaled, and neither are those without a temperature."""
    if temperature is None:
        return 1.0
    else:
        given = tl.load(temperature + row)
        return tl.where(given == 0.0, 1.0, tl.maximum(given, MIN_TEMPERATURE))


@triton.jit
def _scaled(logits, token, mask, divisor):
    """The scaled logits of tokens, -inf outside the mask. Adding 0 makes -0.0 equal to 0.0."""
    logit = tl.load(logits + token, mask=mask, other=float("-inf")).to(tl.float32)
    return tl.div_rn(logit, divisor) + 0.0


@triton.jit
def _order(value, token):
    """Larger for likelier tokens, and of equally likely ones for that of the smaller id."""
    bits = value.to(tl.int32, bitcast=True)
    ascending = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)
    return ascending * IDS + (IDS - 1) - token


@triton.jit
def _token_of(order):
    return (order & (IDS - 1)) ^ (IDS - 1)


@triton.jit
def _value_of(order):
    """The scaled logit."""
    ascending = (order >> ID_BITS).to(tl.int32)
    return tl.where(ascending >= 0, ascending, ascending ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _weight(value, peak):
    return (tl.exp(value - peak) * UNIT).to(tl.int64)


@triton.jit
def _above(least, orders, count, peak, floor, BLOCK: tl.constexpr):
    """(number, weight) of those of `count` orders that are `least` or more.

    Tokens with a scaled logit below `floor` have no weight.
    """
    number = tl.sum(tl.zeros((BLOCK,), tl.int32))
    weight = tl.sum(tl.zeros((BLOCK,), tl.int64))
    for base in range(0, count, BLOCK):
        place = base + tl.arange(0, BLOCK)
        order = tl.load(orders + place, mask=place < count, other=NONE)
        value = _value_of(order)
        taken = order >= least
        number += tl.sum(taken.to(tl.int32))
        weight += tl.sum(tl.where(taken & (value >= floor), _weight(value, peak), 0))
    return number, weight


@triton.jit
def _search(low, high, target, by_number, orders, count, peak, floor, BLOCK: tl.constexpr):
    """The order that parts the tokens, from the likeliest down, after the first with which there is more than
    `target`, in number or in weight. At or above `low` there must be more than that, above `high` not.
    """
    tokens_low, _ = _above(low, orders, count, peak, floor, BLOCK)
    tokens_high, _ = _above(high, orders, count, peak, floor, BLOCK)
    while (tokens_low - tokens_high > 1) & (high - low > 1):
        middle = low + (high - low) // 2
        number, weight = _above(middle, orders, count, peak, floor, BLOCK)
        enough = tl.where(by_number, number.to(tl.int64), weight) > target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        tokens_low = tl.where(enough, number, tokens_low)
        tokens_high = tl.where(enough, tokens_high, number)
    return low


@triton.jit
def _least_from(least, orders, count, BLOCK: tl.constexpr):
    """The smallest of the orders that are `least` or more."""
    found = tl.min(tl.full((BLOCK,), -NONE, tl.int64))
    for base in range(0, count, BLOCK):
        place = base + tl.arange(0, BLOCK)
        order = tl.load(orders + place, mask=place < count, other=NONE)
        found = tl.minimum(found, tl.min(tl.where(order >= least, order, -NONE)))
    return found


@triton.jit
def _largest_below(below, orders, count, BLOCK: tl.constexpr):
    """The largest of the orders under `below`."""
    found = tl.max(tl.full((BLOCK,), NONE, tl.int64))
    for base in range(0, count, BLOCK):
        place = base + tl.arange(0, BLOCK)
        order = tl.load(orders + place, mask=place < count, other=NONE)
        found = tl.maximum(found, tl.max(tl.where(order < below, order, NONE)))
    return found


@triton.jit
def _lowest():
    """Above NONE, and below the order of any token."""
    return tl.full((), NONE + 1, tl.int64)


@triton.jit
def _reach(share, weight):
    """The target of a `_search` for the token with which `share` of the weight is reached."""
    wanted = share.to(tl.float64) * weight.to(tl.float64)
    whole = wanted.to(tl.int64)
    return tl.maximum(tl.where(whole.to(tl.float64) == wanted, whole - 1, whole), 0)


@triton.jit
def summarise(
    logits, temperature, leaders, peaks, sums, places, vocabulary, logits_row, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes the largest scaled logit of each chunk of each row, the sum of exponentials relative to it, and
    where it is first: [B, CHUNKS]. leaders [B, CHUNKS, CHUNK / GROUP]: the largest of each group as an order
    whose id is the group's number in the row."""
    row, chunk = (tl.program_id(0) // CHUNKS).to(tl.int64), tl.program_id(0) % CHUNKS
    here = tl.arange(0, CHUNK)
    token = chunk * CHUNK + here
    value = _scaled(logits + row * logits_row, token, token < vocabulary, _divisor(temperature, row))
    groups: tl.constexpr = CHUNK // GROUP
    of_group = tl.max(tl.reshape(value, (groups, GROUP)), 1)
    group = chunk * groups + tl.arange(0, groups)
    tl.store(leaders + row * (CHUNKS * groups) + group, _order(of_group, group))
    peak = tl.max(of_group, 0)
    origin = tl.where(peak > float("-inf"), peak, 0.0)
    tl.store(peaks + tl.program_id(0), peak)
    tl.store(sums + tl.program_id(0), tl.sum(tl.exp(value - origin).to(tl.float64), 0))
    tl.store(places + tl.program_id(0), tl.min(tl.where(value == peak, token, (chunk + 1) * CHUNK), 0))


@triton.jit
def _row_summary(peaks, sums, row, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr):
    """(largest scaled logit, sum of the exponentials relative to it) of a row."""
    chunk = tl.arange(0, BLOCK_C)
    chunk_peak = tl.load(peaks + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=float("-inf"))
    chunk_sum = tl.load(sums + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=0.0)
    peak = tl.max(chunk_peak, 0)
    return peak, tl.sum(chunk_sum * tl.exp(chunk_peak - peak).to(tl.float64), 0)


@triton.jit
def _value_with(target, by_number, leaders, groups, peak, BLOCK: tl.constexpr):
    """The value with which leaders, from the likeliest down, exceed a target; -inf if all do not."""
    low, high = _lowest(), _order(peak, 0) + 1
    anything = float("-inf")
    number, weight = _above(low, leaders, groups, peak, anything, BLOCK)
    value = peak * 0.0 + anything
    if tl.where(by_number, number.to(tl.int64), weight) > target:
        low = _search(low, high, target, by_number, leaders, groups, peak, anything, BLOCK)
        value = _value_of(_least_from(low, leaders, groups, BLOCK))
    return value


@triton.jit(do_not_specialize=["likeliest", "groups", "vocabulary"])
def bound(
    temperature, top_k, top_p, min_p, leaders, peaks, sums, least, counts, likeliest, groups, vocabulary,
    CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes for each row `least`, a scaled logit that no token which is kept lies below, inf where nothing
    is filtered; and counts = 0. Without a temperature the `likeliest` tokens are kept, as many as that says.

    Leaders are tokens too: where so many of them lie, or so much weight of theirs, lie all that are kept.
    """
    row = tl.program_id(0).to(tl.int64)
    peak, total = _row_summary(peaks, sums, row, CHUNKS, BLOCK_C)
    leaders += row * groups
    tl.store(counts + row, 0)
    if temperature is None:
        tl.store(least + row, _value_with(likeliest.to(tl.int64) - 1, True, leaders, groups, peak, BLOCK))
    else:
        kept, share, ratio = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
        bounded = peak * 0.0 + float("inf")
        if tl.load(temperature + row) != 0.0:
            if kept > 0:
                bounded = _value_with(kept.to(tl.int64) - 1, True, leaders, groups, peak, BLOCK)
            elif (share < 1.0) | (ratio > 0.0):
                # Tokens of less than (1 - top_p) / vocabulary sum to less than 1 - top_p.
                rest = (1.0 - share) * total.to(tl.float32) / vocabulary
                bounded = peak + tl.log(tl.maximum(tl.maximum(rest, ratio), 1e-37)) - MARGIN
                if share < 1.0:
                    target = (share.to(tl.float64) * total * (UNIT * (1.0 + MARGIN))).to(tl.int64)
                    bounded = tl.maximum(bounded, _value_with(target, False, leaders, groups, peak, BLOCK))
        tl.store(least + row, bounded)


@triton.jit
def gather(
    logits, temperature, chosen, peaks, least, orders, counts, weights, likelier, vocabulary, logits_row,
    CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Lists the tokens of `least` or more in orders [B, V], one after another as it happens, and adds up
    their number in counts [B].

    weights [B, CHUNKS]: of each chunk. Or, where tokens are chosen: likelier [B, CHUNKS], the number of those
    in the chunk that are likelier than the chosen one.
    """
    row, chunk = (tl.program_id(0) // CHUNKS).to(tl.int64), tl.program_id(0) % CHUNKS
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = token < vocabulary
    logits += row * logits_row
    divisor = _divisor(temperature, row)
    value = _scaled(logits, token, mask, divisor)
    if chosen is None:
        each = tl.arange(0, BLOCK_C)
        peak = tl.max(tl.load(peaks + row * CHUNKS + each, mask=each < CHUNKS, other=float("-inf")), 0)
        tl.store(weights + tl.program_id(0), tl.sum(_weight(value, peak), 0))
    else:
        bar = _scaled(logits, tl.load(chosen + row), True, divisor)
        tl.store(likelier + tl.program_id(0), tl.sum((value > bar).to(tl.int32), 0))
    listed = (mask & (value >= tl.load(least + row))).to(tl.int32)
    number = tl.sum(listed, 0)
    if number > 0:
        place = tl.atomic_add(counts + row, number) + tl.cumsum(listed, 0) - 1
        tl.store(orders + row * vocabulary + place, _order(value, token), mask=listed > 0)


@triton.jit
def _draw_whole(
    logits, divisor, peak, weights, uniform, vocabulary, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The token at which the weights by id exceed the share `uniform` of them all: its chunk, then itself."""
    chunk = tl.arange(0, BLOCK_C)
    upto = tl.cumsum(tl.load(weights + chunk, mask=chunk < CHUNKS, other=0), 0)
    total = tl.max(upto, 0)
    target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
    number = tl.sum((upto <= target).to(tl.int32), 0)
    before = tl.max(tl.where(upto <= target, upto, 0), 0)
    token = number * CHUNK + tl.arange(0, CHUNK)
    upto = before + tl.cumsum(_weight(_scaled(logits, token, token < vocabulary, divisor), peak), 0)
    return (number * CHUNK + tl.sum((upto <= target).to(tl.int32), 0)).to(tl.int64)


@triton.jit
def _draw_filtered(orders, count, peak, kept, share, ratio, uniform, whole, BLOCK: tl.constexpr):
    """The token at which the weights of those that are kept, from the likeliest down, exceed `uniform` of
    theirs. whole: the weight of all tokens, listed or not."""
    low, high = _lowest(), _order(peak, 0) + 1
    anything = float("-inf")
    number, weight = _above(low, orders, count, peak, anything, BLOCK)
    if kept > 0:
        if kept < number:
            low = _search(low, high, kept.to(tl.int64) - 1, True, orders, count, peak, anything, BLOCK)
            _, weight = _above(low, orders, count, peak, anything, BLOCK)
        whole = weight
    if share < 1.0:
        target = _reach(share, whole)
        if target < weight:
            low = _search(low, high, target, False, orders, count, peak, anything, BLOCK)
    floor = tl.where(ratio > 0.0, peak + tl.log(tl.maximum(ratio, 1e-37)), anything)
    _, weight = _above(low, orders, count, peak, floor, BLOCK)
    target = tl.minimum((uniform * weight.to(tl.float64)).to(tl.int64), weight - 1)
    low = _search(low, high, target, False, orders, count, peak, floor, BLOCK)
    return _token_of(_least_from(low, orders, count, BLOCK))


@triton.jit
def draw(
    logits, temperature, top_k, top_p, min_p, uniform, peaks, places, least, orders, counts, weights, out,
    vocabulary, logits_row, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out [B] int64. In a row of NaN nothing is found: it gets its last token."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK_C)
    chunk_peak = tl.load(peaks + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=float("-inf"))
    peak = tl.max(chunk_peak, 0)
    weights += row * CHUNKS
    if tl.load(temperature + row) == 0.0:
        place = tl.load(places + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=0)
        token = tl.min(tl.where(chunk_peak == peak, place, vocabulary), 0).to(tl.int64)
    elif tl.load(least + row) == float("inf"):
        logits += row * logits_row
        divisor, share = _divisor(temperature, row), tl.load(uniform + row)
        token = _draw_whole(logits, divisor, peak, weights, share, vocabulary, CHUNKS, BLOCK_C, CHUNK)
    else:
        token = _draw_filtered(
            orders + row * vocabulary,
            tl.load(counts + row),
            peak,
            tl.load(top_k + row),
            tl.load(top_p + row),
            tl.load(min_p + row),
            tl.load(uniform + row),
            tl.sum(tl.load(weights + chunk, mask=chunk < CHUNKS, other=0), 0),
            BLOCK,
        )
    tl.store(out + row, tl.minimum(tl.maximum(token, 0), vocabulary - 1))


@triton.jit(do_not_specialize=["likeliest"])
def rank(
    logits, chosen, peaks, sums, orders, counts, likelier, out, ranks, top_tokens, top, likeliest, vocabulary,
    logits_row, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out and ranks [B]: log-probability and rank of the chosen tokens; top_tokens and top [B, likeliest]."""
    row = tl.program_id(0).to(tl.int64)
    peak, total = _row_summary(peaks, sums, row, CHUNKS, BLOCK_C)
    normaliser = peak + tl.log(total.to(tl.float32))
    logits += row * logits_row
    tl.store(out + row, _scaled(logits, tl.load(chosen + row), True, 1.0) - normaliser)
    chunk = tl.arange(0, BLOCK_C)
    before = tl.sum(tl.load(likelier + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=0), 0)
    tl.store(ranks + row, (before + 1).to(tl.int64))
    count = tl.load(counts + row)
    below = _order(peak, 0) + 1
    for i in range(likeliest):
        below = _largest_below(below, orders + row * vocabulary, count, BLOCK)
        tl.store(top_tokens + row * likeliest + i, tl.minimum(_token_of(below), vocabulary - 1))
        tl.store(top + row * likeliest + i, _value_of(below) - normaliser)
