"""The operator's settings: one flat table, whose fields are the flags of `fastserve serve`.

A field's name with dashes is its flag; its docstring metadata is that flag's help. Every model of the
ensemble reads the same settings, from the JSON file that the environment variable FASTSERVE_CONFIG names.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Rate = Annotated[float, Meta(ge=1e-6, le=1e12)]
"""Per second."""
CONFIG_VARIABLE = "FASTSERVE_CONFIG"
"""The settings' JSON file."""
STOPPING_VARIABLE = "FASTSERVE_STOPPING"
"""A file that the launcher makes when the server is to take no more requests: see `is_stopping`."""
MODEL_CONTROL_VARIABLE = "FASTSERVE_MODEL_CONTROL"
"""`explicit`: the models may load and unload one another."""


class ConfigError(Exception):
    """A setting that cannot be; the sentence names the field, what came and what is allowed."""


class TenantQuota(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a tenant may ask for: at least one limit. `scheduling.quotas` enforces it."""

    requests_per_second: Rate | None = None
    tokens_per_second: Rate | None = None
    """Of prompts and answers."""
    tokens_in_flight: Annotated[int, Meta(ge=1)] | None = None
    """Of the prompts and longest answers of requests that wait or run."""
    requests_in_flight: Annotated[int, Meta(ge=1)] | None = None
    """Requests that wait or run."""
    burst_seconds: Annotated[float, Meta(gt=0.0, le=1e6)] = 10.0
    """What a rate gives in so many seconds may be used at once."""

    def __post_init__(self) -> None:
        limits = (
            self.requests_per_second,
            self.tokens_per_second,
            self.tokens_in_flight,
            self.requests_in_flight,
        )
        if all(limit is None for limit in limits):
            raise ValueError(
                "got no limit; allowed: at least one of requests_per_second, tokens_per_second, "
                "tokens_in_flight and requests_in_flight"
            )


class Config(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of the engine and of the serving around it."""

    model: Annotated[
        str, Meta(description="Hugging Face directory, GGUF file or hub name; empty: the default model")
    ] = ""
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Meta(description="of weights and activations; auto: the checkpoint's own, bfloat16 for GGUF"),
    ] = "auto"
    quantization: Annotated[
        Literal["auto", "none", "int4", "int8", "nf4", "fp8", "w8a8"],
        Meta(
            description="of weights; auto: as the checkpoint holds them; none: all in `dtype`; the others: "
            "rounded when loaded"
        ),
    ] = "auto"
    activation_quantization: Annotated[
        Literal["auto", "none", "int8"],
        Meta(
            description="of what meets weights of 4 and 8 bits on a CPU: int8: rounded to 8 bits, in groups; "
            "auto: so where it is faster, which is measured at the start, and `dtype` is bfloat16"
        ),
    ] = "auto"
    device: Annotated[
        str,
        Meta(
            description="cpu, cuda, cuda:N; auto: a GPU if there is one", pattern=r"^(auto|cpu|cuda(:\d+)?)$"
        ),
    ] = "auto"
    max_model_len: Annotated[
        int, Meta(ge=0, description="tokens of prompt and answer together; 0: the model's own limit")
    ] = 0
    max_num_seqs: Annotated[int, Meta(ge=1, le=4096, description="sequences in the batch")] = 64
    max_num_batched_tokens: Annotated[
        int, Meta(ge=1, description="tokens computed in a step: longer prompts are computed in chunks")
    ] = 512
    target_itl_ms: Annotated[
        float,
        Meta(
            ge=0.0,
            description="between two tokens of a stream: while others decode, a step computes no more of "
            "prompts than keeps to it; 0: as much as `max_num_batched_tokens` lets it",
        ),
    ] = 0.0
    speculative_method: Annotated[
        Literal["none", "ngram"],
        Meta(
            description="ngram: proposes what followed the last tokens where they stood before, in prompt or "
            "answer, where that is measured to be faster; the text is the same. none: one token a step"
        ),
    ] = "ngram"
    num_speculative_tokens: Annotated[
        int, Meta(ge=1, le=64, description="proposed for a sequence in a step, at most")
    ] = 8
    block_size: Annotated[int, Meta(ge=1, le=1024, description="tokens in a KV block")] = 16
    kv_cache_bytes: Annotated[
        int, Meta(ge=0, description="of the KV cache; 0: 1 GiB on a CPU, what is free on a GPU")
    ] = 0
    swap_space_bytes: Annotated[
        int,
        Meta(
            ge=0, description="of host memory for KV blocks of preempted requests, for each replica; 0: none"
        ),
    ] = 1 << 30
    kv_cache_dtype: Annotated[
        Literal["auto", "int8", "fp8"],
        Meta(
            description="of the KV cache, with the checkpoint's scales or with scales measured when it is "
            "loaded; auto: what the checkpoint names, else that of the weights"
        ),
    ] = "auto"
    enable_prefix_caching: Annotated[bool, Meta(description="reuse KV blocks of equal prefixes")] = True
    replicas: Annotated[
        int,
        Meta(
            ge=1, le=64, description="workers, each with the model: one a GPU, or with a share of the cores"
        ),
    ] = 1
    tensor_parallel_size: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description="processes (ranks) that compute each replica's model together, a part of "
            "every layer each",
        ),
    ] = 1
    pipeline_parallel_size: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description="stages, of `tensor_parallel_size` ranks each, that have some of the layers and work "
            "at different steps at the same time",
        ),
    ] = 1
    num_threads: Annotated[
        int,
        Meta(ge=0, description="of each worker, and rank, on a CPU; 0: as many as its share of the cores"),
    ] = 0
    policy: Annotated[
        str,
        Meta(
            description="who runs first: priority_age, fcfs, mlfq, hrrn, fair, or FILE.py:NAME, a class or "
            "function of one's own that makes a policy of these settings"
        ),
    ] = "priority_age"
    alpha: Annotated[float, Meta(ge=0.0, description="score of one step of priority")] = 10.0
    beta: Annotated[float, Meta(gt=0.0, description="score of one second of waiting")] = 1.0
    starvation_seconds: Annotated[
        float,
        Meta(gt=0.0, description="under mlfq and fair, a request that has waited so long goes before others"),
    ] = 600.0
    tenant_weights: Annotated[
        dict[str, Annotated[float, Meta(gt=0.0)]],
        Meta(description='under fair, shares of tenants, as JSON: {"paying": 4}; 1 for those not named'),
    ] = {}
    priority_range: Annotated[
        tuple[Int32, Int32],
        Meta(
            description="of requests' `priority`, beyond which they are refused; 0 is in it, as theirs who "
            "name none. Write it with `=`: --priority-range=-5,5"
        ),
    ] = (-10, 10)
    tenant_quotas: Annotated[
        dict[Annotated[str, Meta(max_length=128)], TenantQuota],
        Meta(
            description="what a tenant may ask for, as JSON: requests_per_second, tokens_per_second, "
            "tokens_in_flight, requests_in_flight and burst_seconds (10: what the rates give in so many "
            'seconds may be used at once), {"free": {"requests_per_second": 2, "tokens_in_flight": 4096}}; '
            "`*`: each tenant that is not named"
        ),
    ] = {}
    max_queue_size: Annotated[
        int, Meta(ge=1, description="requests that may wait; more are refused with UNAVAILABLE")
    ] = 1024
    max_queue_seconds: Annotated[float, Meta(ge=0.0, description="a request may wait; 0: for ever")] = 0.0
    max_request_seconds: Annotated[
        float, Meta(gt=0.0, description="a request may take from arrival to end")
    ] = 600.0
    stream_interval_ms: Annotated[
        float,
        Meta(
            ge=0.0,
            description="at least so long between two responses of a stream, after the first; with 100, "
            "tokens come in larger pieces, and more a second",
        ),
    ] = 0.0
    max_responses_per_second: Annotated[
        int,
        Meta(
            ge=0,
            description="of all streams together: with many, each waits longer; 0: 2 streams per CPU core "
            "have theirs as they come, those beyond 160 per core",
        ),
    ] = 0

    keys_file: Annotated[
        str,
        Meta(
            description="JSON file of keys (`fastserve keys`): nobody is served without one; it is read "
            "again when it changes"
        ),
    ] = ""
    request_log: Annotated[
        str, Meta(description="file that gets a line of JSON for each request; rotated, 5 full ones are kept")
    ] = ""
    request_log_bytes: Annotated[
        int, Meta(ge=1 << 12, description="of the request log, beyond which it is rotated")
    ] = 1 << 26
    log_prompts: Annotated[
        Literal["none", "masked", "full"],
        Meta(
            description="prompts and answers in the request log; masked: without addresses, numbers of "
            "phones, cards and accounts, and keys, as far as they are found (extra `masking`)"
        ),
    ] = "none"

    def __post_init__(self) -> None:
        for name in ("keys_file", "request_log"):  # models run in other directories
            if path := getattr(self, name):
                msgspec.structs.force_setattr(self, name, os.path.abspath(path))
        if self.log_prompts != "none" and not self.request_log:
            raise ValueError(
                f"`log_prompts`: got {self.log_prompts}; allowed: none, where there is no `request_log`"
            )
        if ":" in self.policy:  # read again by processes that run in other directories
            msgspec.structs.force_setattr(self, "policy", os.path.abspath(self.policy))
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"`max_num_batched_tokens`: got {self.max_num_batched_tokens}; allowed: at least "
                f"`max_num_seqs`, {self.max_num_seqs}, so that each sequence of a full batch gets its token"
            )
        low, high = self.priority_range
        if not low <= 0 <= high:
            raise ValueError(
                f"`priority_range`: got {low},{high}; allowed: LOW,HIGH with LOW at most 0 and HIGH at least "
                "0, the priority of requests that name none"
            )


def check_ranks(config: Config) -> None:
    """Raises ConfigError if ranks, or their threads, are more than the cores, where they would wait for
    others, and for settings that several ranks cannot have."""
    ranks, cores = config.tensor_parallel_size * config.pipeline_parallel_size, len(os.sched_getaffinity(0))
    if ranks > 1 and ranks * config.replicas * max(1, config.num_threads) > cores:
        threads = f" of {config.num_threads} threads" if config.num_threads > 1 else ""
        name = "tensor" if config.tensor_parallel_size > 1 else "pipeline"
        stages = f" in {config.pipeline_parallel_size} stages" if config.pipeline_parallel_size > 1 else ""
        raise ConfigError(
            f"`{name}_parallel_size`: got {getattr(config, f'{name}_parallel_size')}{stages} for "
            f"{config.replicas} replica(s){threads}; allowed: as many in all as there are cores, {cores}: "
            "fewer ranks, stages, replicas or `num_threads`"
        )
    if ranks > 1 and config.device.startswith("cuda"):
        raise ConfigError(f"`device`: got {config.device!r} for {ranks} ranks; allowed: cpu, or one rank")
    if config.pipeline_parallel_size > 1 and config.kv_cache_dtype != "auto":
        raise ConfigError(
            f"`kv_cache_dtype`: got {config.kv_cache_dtype!r} for {config.pipeline_parallel_size} stages; "
            "allowed: auto, with the checkpoint's own scales: no stage can measure any alone"
        )


def read_config() -> Config:
    """The settings in the file that FASTSERVE_CONFIG names, or the defaults where it is not set.

    Raises ConfigError.
    """
    path = os.environ.get(CONFIG_VARIABLE)
    if not path:
        return Config()
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Config)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{CONFIG_VARIABLE}={path}: {error}") from error


def is_stopping() -> bool:
    """Whether the launcher has said that the server is stopping.

    It says so by a file, so nothing has to reach the models through a server that is busy. Without the
    environment variable FASTSERVE_STOPPING it never is.
    """
    path = os.environ.get(STOPPING_VARIABLE)
    return path is not None and os.path.exists(path)
