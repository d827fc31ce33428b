"""Sampling on a CPU without sorting the vocabulary: by the likeliest few, where these are all that is kept.

Each row takes one of three ways, which its own parameters choose: greedy, the whole distribution, or a
filtered one. None depends on the other rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastserve_kernels.reference import MIN_TEMPERATURE

CANDIDATES = 128
"""How many of the likeliest tokens are looked at before a row is sorted further."""
SPAN = 256
"""Tokens whose probabilities are summed first when the whole distribution is inverted."""


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """`ops.sample`."""
    greedy = temperature == 0
    filtered = ((top_k > 0) | (top_p < 1) | (min_p > 0)) & ~greedy
    whole = ~(greedy | filtered)
    tokens = torch.empty(len(logits), dtype=torch.int64)
    if greedy.any():
        tokens[greedy] = _rows(logits, greedy).argmax(-1)
    if whole.any():
        scaled = _scaled(_rows(logits, whole), temperature[whole])
        tokens[whole] = _invert_whole(scaled.softmax(-1), uniform[whole])
    if filtered.any():
        parameters = (temperature, top_k, top_p, min_p, uniform)
        tokens[filtered] = _draw_filtered(_rows(logits, filtered), *(p[filtered] for p in parameters))
    return tokens.clamp_(max=logits.shape[1] - 1)  # the padding of a row of NaN is as likely as its tokens


def _scaled(logits: Tensor, temperature: Tensor) -> Tensor:
    return logits.float() / temperature.float().clamp(min=MIN_TEMPERATURE)[:, None]


def _rows(logits: Tensor, chosen: Tensor) -> Tensor:
    return logits if chosen.all() else logits[chosen]


def _invert_whole(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Inverts each row's cumulative distribution, in the order of token ids: by spans, then within one."""
    rows, vocabulary = probabilities.shape
    spans = torch.nn.functional.pad(probabilities, (0, -vocabulary % SPAN)).view(rows, -1, SPAN)
    masses = spans.sum(-1, dtype=torch.float64)
    span, remainder = _invert(masses, uniform.double() * masses.sum(-1))
    within, _ = _invert(spans[torch.arange(rows), span].double(), remainder)
    return span * SPAN + within


def _invert(masses: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first place at which the running sum of masses [n, m] exceeds target [n], and what is left of the
    target there. Never a place of no mass, unless the row has none at all."""
    ends = masses.cumsum(-1)
    place = torch.searchsorted(ends, target[:, None], right=True)[:, 0]
    last = masses.shape[1] - 1 - (masses > 0).flip(-1).byte().argmax(-1)
    place = torch.minimum(place, last)
    before = ends.gather(1, place[:, None])[:, 0] - masses.gather(1, place[:, None])[:, 0]
    return place, target - before


def _draw_filtered(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    vocabulary = logits.shape[1]
    scaled = _scaled(logits, temperature)
    likeliest, ids = _sorted(*scaled.topk(min(CANDIDATES, vocabulary)))
    by_mass = (top_k <= 0) & (top_p < 1)
    total = torch.zeros(len(logits), dtype=torch.float64)
    if by_mass.any():
        total[by_mass] = 1 / _rows(scaled, by_mass).softmax(-1).amax(-1).double()
    tokens, last = _draw(likeliest, ids, total, top_k, top_p, min_p, uniform)
    # All that is kept has been seen if it is likelier than the last candidate; others may tie with that one.
    settled = (last > likeliest[:, -1]) & (top_k <= CANDIDATES)
    settled |= ~likeliest[:, 0].isfinite()  # there is no order in such a row: any of its tokens will do
    if vocabulary > CANDIDATES:
        for row in (~settled).nonzero()[:, 0].tolist():
            one = slice(row, row + 1)
            floor = _floor(
                scaled[row], float(total[row]), int(top_k[row]), float(top_p[row]), float(min_p[row])
            )
            likeliest, ids = _sorted_row(scaled[row], floor)
            tokens[one], _ = _draw(
                likeliest[None], ids[None], total[one], top_k[one], top_p[one], min_p[one], uniform[one]
            )
    return tokens


def _sorted(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """By value, largest first, and equal values by id."""
    ids, order = ids.sort(dim=-1)
    values, place = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, place)


def _sorted_row(scaled: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """The values that are not below floor, as `_sorted` orders them, and their ids.

    Sorts whole numbers whose upper half orders the values and whose lower half is the id: numpy does that
    with vector instructions, ten times as fast as torch's stable sort.
    """
    kept = (scaled >= floor).nonzero()[:, 0].numpy()
    # Adding 0.0 makes -0.0 equal to 0.0.
    bits = (scaled.numpy()[kept] + np.float32(0.0)).view(np.int32)
    ascending = np.where(bits >= 0, bits, bits ^ np.int32(0x7FFFFFFF))
    keys = (~ascending).astype(np.int64) << 32 | kept
    keys.sort()
    ids = torch.from_numpy(keys & 0xFFFFFFFF)
    return scaled[ids], ids


def _floor(scaled: Tensor, total: float, top_k: int, top_p: float, min_p: float) -> float:
    """A value that no token which is kept lies below; the hundredth part less allows for rounding.

    All tokens less likely than (1 - top_p) / vocabulary make up less than 1 - top_p, so top_p keeps none.
    """
    if 0 < top_k < len(scaled):
        return float(scaled.topk(top_k).values[-1])
    peak = float(scaled.max())
    least = 0.99 * max(min_p, total * (1 - top_p) / len(scaled))
    return peak + float(torch.tensor(least, dtype=torch.float64).log())


def _draw(
    likeliest: Tensor,
    ids: Tensor,
    total: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
) -> tuple[Tensor, Tensor]:
    """(token, value of the last that is kept) of each row, from its likeliest tokens in order [n, m].

    total [n]: the mass of all tokens relative to the likeliest; not used where there is a top_k.
    """
    width = likeliest.shape[1]
    place = torch.arange(width)
    masses = (likeliest.double() - likeliest[:, :1].double()).exp()
    limit = torch.where(top_k > 0, top_k, width)[:, None]
    masses = masses.masked_fill(place >= limit, 0.0)
    before = masses.cumsum(-1) - masses
    whole = torch.where(top_k > 0, masses.sum(-1), total)
    dropped = (before >= (top_p.double() * whole)[:, None]) & (place > 0) & (top_p < 1)[:, None]
    masses = masses.masked_fill(dropped | (masses < min_p[:, None]), 0.0)
    kept = (masses > 0).sum(-1, keepdim=True)
    chosen, _ = _invert(masses, uniform.double() * masses.sum(-1))
    return ids.gather(1, chosen[:, None])[:, 0], likeliest.gather(1, (kept - 1).clamp(min=0))[:, 0]


def log_probs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.log_probs`."""
    logits = logits.float()
    chosen = logits.gather(1, token_ids[:, None])
    rank = (logits > chosen).sum(-1) + 1
    likeliest, top_ids = _sorted(*logits.topk(max(k, 1)))
    # exp(max - logsumexp) is the largest probability, and softmax is several times faster than logsumexp.
    normaliser = likeliest[:, :1] - logits.softmax(-1).amax(-1, keepdim=True).log()
    return (chosen - normaliser)[:, 0], rank, top_ids[:, :k], (likeliest - normaliser)[:, :k]
