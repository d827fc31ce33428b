"""Codes of 1 to 8 bits one after another in words of 32, the first in the lowest bits of the first word.

A code may begin in one word and end in the next.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def words_of(columns: int, bits: int) -> int:
    """How many words a row of so many codes fills."""
    return -(-columns * bits // 32)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K] uint8, each below 2^bits, as words [N, ceil(K bits / 32)] int32."""
    # Eight codes fill whole bytes, whatever their bits.
    eights = pad(codes, (0, -codes.shape[1] % 8)).unflatten(1, (-1, 8))
    packed = torch.zeros(eights.shape[:2], dtype=torch.int64, device=codes.device)
    for place in range(8):
        packed |= eights[..., place].long() << bits * place
    filled = packed.view(torch.uint8).unflatten(1, (-1, 8))[..., :bits].flatten(1)
    padded = pad(filled, (0, 4 * words_of(codes.shape[1], bits) - filled.shape[1]))
    return padded.flatten().view(torch.int32).view(len(codes), -1)


def unpack_codes(words: Tensor, bits: int, columns: int) -> Tensor:
    """The reverse: words [N, ceil(columns bits / 32)] int32 as codes [N, columns] uint8."""
    # The lowest byte of a word comes first on every machine that torch is built for.
    filled = words.flatten().view(torch.uint8).view(len(words), -1)
    size = -(-columns // 8) * bits
    eights = pad(filled, (0, size - filled.shape[1])).unflatten(1, (-1, bits))
    packed = pad(eights, (0, 8 - bits)).flatten().view(torch.int64).view(*eights.shape[:2], 1)
    places = [(packed >> bits * place & 2**bits - 1).to(torch.uint8) for place in range(8)]
    return torch.cat(places, dim=-1).flatten(1)[:, :columns]
