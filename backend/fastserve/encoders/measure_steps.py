"""python -m fastserve.encoders.measure_steps SETTINGS: loads an encoder and prints its `EncoderProfile`.

Both are JSON. A process of its own, so that the launcher need not load torch, and so that what is loaded is
gone with it.
"""

from __future__ import annotations

import sys
import time

import msgspec

from fastserve.checkpoints.model_error import ModelError
from fastserve.encoders.served_encoder import EncoderProfile, EncoderSettings
from fastserve.openmp import limit_spinning

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
TEXT_TOKENS = 40
"""Of each text: what a sentence has."""
MIN_SECONDS = 2.0
"""For which all sizes are measured by turns; of each the shortest time counts, as other programs disturb."""
MIN_ROUNDS = 2


def measure(settings: EncoderSettings, min_seconds: float = MIN_SECONDS) -> EncoderProfile:
    """Loads the encoder in this process, and measures for so long at least. Raises ModelError."""
    limit_spinning()
    import torch  # after it

    from fastserve.encoders.encoder import Encoder
    from fastserve.encoders.ragged_batch import TokenSequence

    torch.set_num_threads(settings.num_threads)
    encoder = Encoder.load(
        settings.model, dtype=settings.dtype, quantization=settings.quantization, device=settings.device
    )
    text = TokenSequence([3] * min(TEXT_TOKENS, encoder.max_length))

    times: dict[int, list[float]] = {size: [] for size in BATCH_SIZES}
    end = time.perf_counter() + min_seconds
    while len(times[1]) < MIN_ROUNDS or time.perf_counter() < end:
        for size in BATCH_SIZES:
            start = time.perf_counter()
            encoder.compute([text] * size)
            times[size].append(time.perf_counter() - start)
    return EncoderProfile(
        task=encoder.task,
        labels=list(encoder.labels),
        labels_tokens=encoder.parts.head_kind == "token",
        dimensions=encoder.dimensions,
        max_length=encoder.max_length,
        step_seconds={size: min(found) for size, found in times.items()},
    )


def main(settings: str) -> int:
    """Returns the exit status: 1 with a sentence on standard error where the model cannot be loaded."""
    try:
        profile = measure(msgspec.json.decode(settings.encode(), type=EncoderSettings))
    except ModelError as error:
        print(f"{error}", file=sys.stderr)
        return 1
    print(msgspec.json.encode(profile).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
