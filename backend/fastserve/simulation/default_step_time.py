"""How long steps take where nothing else is given."""

from __future__ import annotations

from fastserve.simulation.step_time import StepTimeModel

DEFAULT_STEP_TIME = StepTimeModel(
    seconds_per_step=15.48e-3,
    seconds_per_sequence=1.396e-3,
    seconds_per_prompt_token=1.103e-3,
    seconds_per_decode_token=0.0,
    seconds_per_context_token=3.069e-6,
    seconds_per_prompt_pair=9.052e-7,
    copy_bytes_per_second=1.994e9,
    kv_bytes_per_token=23040,
    model="SmolLM2-135M-Instruct.Q4_1.gguf",
    machine="AMD EPYC, 2 cores, Linux 6.18.44",
    num_threads=2,
    num_steps=123,
    r_squared=0.9763,
    median_relative_error=0.0495,
)
"""What `fastserve bench --calibrate` measured of the default model on two cores, beside other work."""
