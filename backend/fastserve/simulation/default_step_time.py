"""How long steps take where nothing else is given."""

from __future__ import annotations

from fastserve.simulation.step_time import StepTimeModel

DEFAULT_STEP_TIME = StepTimeModel(
    seconds_per_step=4e-3,
    seconds_per_sequence=0.0,
    seconds_per_prompt_token=3e-4,
    seconds_per_decode_token=1.2e-3,
    seconds_per_context_token=1e-7,
    seconds_per_prompt_pair=0.0,
    copy_bytes_per_second=5e9,
    kv_bytes_per_token=23040,
    model="",
    machine="",
    num_threads=2,
    num_steps=1,
    r_squared=1.0,
    median_relative_error=0.0,
)
"""Of the default model on two cores."""
