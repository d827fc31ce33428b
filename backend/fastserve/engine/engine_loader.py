"""From settings to an engine that is ready to step."""

from __future__ import annotations

import os

import torch

from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.model_files import ModelFiles
from fastserve.checkpoints.model_metadata import eos_token_ids
from fastserve.config import Config
from fastserve.engine.engine import Engine
from fastserve.engine.guides import GuideCompiler
from fastserve.engine.kv_scales import choose_kv_cache
from fastserve.engine.model_runner import ModelRunner
from fastserve.engine.pipelined_model_runner import LaterStageRunner, PipelinedModelRunner
from fastserve.engine.rank_layout import RankLayout
from fastserve.engine.ranked_model_runner import RankedModelRunner
from fastserve.engine.ranks import start_ranks
from fastserve.engine.sampler import Sampler
from fastserve.engine.speculator import Speculator
from fastserve.models.causal_lm import CausalLM
from fastserve.models.decoder import Decoder
from fastserve.models.kv_cache import default_cache_bytes
from fastserve.models.model_loader import load_model
from fastserve.scheduling.block_pool import BlockPool
from fastserve.scheduling.iteration_scheduler import IterationScheduler
from fastserve.scheduling.policies.registry import make_policy
from fastserve_kernels.process_group import ProcessGroup

MAX_CAPTURED_TOKENS = 2048
"""Of a step that is recorded, which takes 25 kB of memory for each with the default model. In a larger one
Python has next to no share of the time."""


def load_engine(
    config: Config, files: ModelFiles, replica: int = 0, has_common_queue: bool = False
) -> Engine:
    """Loads the model, makes its KV cache and runs it once. Raises ModelError.

    `replica`: which of `config.replicas` it is. `has_common_queue`: see `Engine`. With several ranks this
    process is the first, and starts the others.
    """
    num_ranks = RankLayout.of(config).world_size
    runner = (
        load_ranked_runner(config, files, replica) if num_ranks > 1 else load_runner(config, files, replica)
    )
    model = runner.model
    num_workers = config.replicas * num_ranks
    takes_all_cores = model.device.type == "cpu" and (
        torch.get_num_threads() * num_workers >= len(os.sched_getaffinity(0))
    )
    pool = BlockPool(
        runner.num_blocks, config.block_size, config.enable_prefix_caching, runner.host.num_blocks
    )
    pool.host.copy_seconds = runner.host.measure_copy_seconds()
    scheduler = IterationScheduler(
        pool,
        make_policy(config),
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.target_itl_ms / 1e3,
        config.pipeline_parallel_size,
    )
    eos = eos_token_ids(files.checkpoint)
    guides = GuideCompiler(files.tokenizer, eos, model.vocab_size)
    max_model_len = min(model.max_position, runner.num_blocks * config.block_size)
    sampler = Sampler(eos, model.vocab_size)
    speculator = Speculator(
        num_speculative_tokens(config), max_decode_tokens(config), max_model_len, config.target_itl_ms / 1e3
    )
    return Engine(
        runner, scheduler, sampler, guides, speculator, max_model_len, has_common_queue, takes_all_cores
    )


def load_ranked_runner(config: Config, files: ModelFiles, replica: int) -> ModelRunner:
    """Starts the other ranks, and loads rank 0's part of the model. Raises ModelError."""
    ranks = start_ranks(config, files, replica)
    try:
        group, following, last = ranks.connections
        runner = load_runner(config, files, replica, group)
        if group is not None:
            runner = RankedModelRunner(runner, ranks, group)
        if following is not None and last is not None:
            runner = PipelinedModelRunner(runner, ranks, following, last)
    except BaseException:
        ranks.close()
        raise
    return runner


def load_runner(
    config: Config, files: ModelFiles, replica: int, group: ProcessGroup | None = None, stage: int = 0
) -> ModelRunner:
    """Loads the model, or a rank's part of it, makes its KV cache and runs it once. Raises ModelError.

    All ranks of `group` call it with the same arguments. `stage`: which one it is of.
    """
    layout = RankLayout.of(config)
    device = choose_device(config.device, replica)
    if device.type == "cpu":
        share = len(os.sched_getaffinity(0)) // (config.replicas * layout.world_size)
        torch.set_num_threads(config.num_threads or max(1, share))
    elif layout.world_size > 1:
        name = "tensor" if layout.tensor_parallel_size > 1 else "pipeline"
        size = getattr(layout, f"{name}_parallel_size")
        raise ModelError(f"{name}_parallel_size: got {size}; allowed on {device.type}: 1")
    model = load_model(
        str(files.checkpoint),
        config.dtype,
        device,
        config.max_model_len,
        config.quantization,
        config.activation_quantization,
        group=group,
        stage=(stage, layout.pipeline_parallel_size),
    )
    kv_dtype, kv_scales = choose_kv_cache(config.kv_cache_dtype, files, model)
    num_sharing = sum(choose_device(config.device, each) == device for each in range(config.replicas))
    make_runner = LaterStageRunner if stage > 0 else ModelRunner
    runner = make_runner(
        model,
        config.block_size,
        _share_of(model, layout, config.kv_cache_bytes or default_cache_bytes(model.device, num_sharing)),
        kv_dtype,
        kv_scales,
        swap_space_bytes=_share_of(model, layout, config.swap_space_bytes),
    )
    runner.warm_up(max(max_decode_tokens(config), min(config.max_num_batched_tokens, MAX_CAPTURED_TOKENS)))
    return runner


def _share_of(model: CausalLM, layout: RankLayout, num_bytes: int) -> int:
    """What a rank has of a replica's memory for KV blocks: by heads, then by layers, so that all ranks have
    as many blocks."""
    share = num_bytes // layout.tensor_parallel_size
    stage = model.stage if isinstance(model, Decoder) else None
    return share if stage is None else share // stage.num_layers * len(stage.layers)


def num_speculative_tokens(config: Config) -> int:
    """Proposed for a sequence in a step, at most."""
    return 0 if config.speculative_method == "none" else config.num_speculative_tokens


def max_decode_tokens(config: Config) -> int:
    """Tokens of a step of decodes, proposed ones among them: as many as a full batch has, or a sequence alone
    with all that is proposed for it."""
    alone = min(1 + num_speculative_tokens(config), config.max_num_batched_tokens)
    return max(config.max_num_seqs, alone)


def choose_device(name: str, replica: int = 0) -> torch.device:
    """The device of a replica. "auto": a GPU if there is one, else the CPU; "cuda": one GPU after another."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        return torch.device("cuda", replica % max(1, torch.cuda.device_count()))
    return torch.device(name)
