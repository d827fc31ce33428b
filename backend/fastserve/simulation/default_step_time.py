"""How long steps take where nothing else is given."""

from __future__ import annotations

from fastserve.simulation.step_time import StepTimeModel

DEFAULT_STEP_TIME = StepTimeModel(
    seconds_per_step=0.003166,
    seconds_per_sequence=0.0002078,
    seconds_per_prompt_token=0.0002443,
    seconds_per_decode_token=0.0001134,
    seconds_per_context_token=8.991e-07,
    seconds_per_prompt_pair=1.472e-07,
    copy_bytes_per_second=2.829e09,
    kv_bytes_per_token=23040,
    model="SmolLM2-135M-Instruct.Q4_1.gguf",
    machine="AMD EPYC (Zen 5), 2 cores",
    num_threads=2,
    num_steps=70,
    r_squared=0.9994,
    median_relative_error=0.02293,
)
"""What `fastserve bench --calibrate` measured of the default model on two cores, with nothing beside it."""
