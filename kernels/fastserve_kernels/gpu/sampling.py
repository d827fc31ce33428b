"""`ops.sample` and `ops.log_probs` on a GPU: what `sampling_kernels` does, launch by launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fastserve_kernels import reference
from fastserve_kernels.gpu import sampling_kernels as kernels
from fastserve_kernels.gpu.launch import Argument, Config, Launch, launch_all
from fastserve_kernels.gpu.operator import Cost, Operator, Shape
from fastserve_kernels.gpu.tuning import config_for

MAX_TOKENS = 1 << 20
"""In the vocabulary: as many ids as an order holds."""


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """`ops.sample`. Raises ValueError for a vocabulary of more than MAX_TOKENS."""
    _check(logits)
    out = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    config = config_for(SAMPLE, _shape_of(logits), logits.device)
    given = (temperature.float(), top_k, top_p.float(), min_p.float(), uniform.double())
    parameters = (tensor.contiguous() for tensor in given)
    launch_all(SAMPLE.plan(logits, *parameters, out, config=config))
    return out


def log_probs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.log_probs`. Raises ValueError for a vocabulary of more than MAX_TOKENS."""
    _check(logits)
    rows, device = len(logits), logits.device
    ranks = torch.empty(rows, dtype=torch.int64, device=device)
    top_ids = torch.empty(rows, k, dtype=torch.int64, device=device)
    top = torch.empty(rows, k, dtype=torch.float32, device=device)
    out = torch.empty(rows, dtype=torch.float32, device=device)
    config = config_for(LOG_PROBS, _shape_of(logits), device)
    launch_all(plan_log_probs(logits, token_ids.contiguous(), k, ranks, top_ids, top, out, config=config))
    return out, ranks, top_ids, top


def _check(logits: Tensor) -> None:
    if logits.shape[1] > MAX_TOKENS:
        raise ValueError(f"logits: a vocabulary of {logits.shape[1]}, must be at most {MAX_TOKENS}")


def _shape_of(logits: Tensor) -> dict[str, int]:
    return {"batch": triton.next_power_of_2(max(len(logits), 1)), "vocabulary": logits.shape[1]}


def _common(logits: Tensor, config: Config) -> tuple[dict[str, Argument], dict[str, int]]:
    """(arguments, constants) that several kernels have, by name."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, vocabulary = logits.shape
    chunk = config.constants["CHUNK"]
    chunks = triton.cdiv(vocabulary, chunk)
    groups = chunks * chunk // kernels.GROUP.value
    arguments: dict[str, Argument] = {
        "logits": logits,
        "vocabulary": vocabulary,
        "logits_row": logits.stride(0),
        "groups": groups,
        "leaders": logits.new_empty(rows, groups, dtype=torch.int64),
        "peaks": logits.new_empty(rows, chunks, dtype=torch.float32),
        "sums": logits.new_empty(rows, chunks, dtype=torch.float64),
        "places": logits.new_empty(rows, chunks, dtype=torch.int32),
        "least": logits.new_empty(rows, dtype=torch.float32),
        "orders": logits.new_empty(rows, vocabulary, dtype=torch.int64),
        "counts": logits.new_empty(rows, dtype=torch.int32),
        "weights": None,
        "likelier": None,
    }
    constants = {
        "CHUNKS": chunks,
        "CHUNK": chunk,
        "BLOCK_C": triton.next_power_of_2(chunks),
        "BLOCK": config.constants["BLOCK"],
    }
    return arguments, constants


def _launches(
    names: tuple[str, ...], arguments: dict[str, Argument], constants: dict[str, int], config: Config
) -> list[Launch]:
    """Each kernel with those of the arguments and constants that it has; a program has a chunk, or a row."""
    rows = arguments["counts"].shape[0]  # type: ignore[union-attr]
    found = []
    for name in names:
        kernel = getattr(kernels, name)
        by_chunk = name in ("summarise", "gather")
        found.append(
            Launch(
                kernel,
                (rows * constants["CHUNKS"] if by_chunk else rows,),
                {key: value for key, value in arguments.items() if key in kernel.arg_names},
                {key: value for key, value in constants.items() if key in kernel.arg_names},
                num_warps=config.num_warps if by_chunk else config.constants["ROW_WARPS"],
                num_stages=config.num_stages,
            )
        )
    return found


def plan_sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    out: Tensor,
    *,
    config: Config,
) -> list[Launch]:
    """The tensors of `ops.sample`, contiguous but for the logits; out [B] int64."""
    arguments, constants = _common(logits, config)
    arguments |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    arguments |= {"uniform": uniform, "out": out, "chosen": None, "likeliest": 0}
    arguments["weights"] = logits.new_empty(len(logits), constants["CHUNKS"], dtype=torch.int64)
    return _launches(("summarise", "bound", "gather", "draw"), arguments, constants, config)


def plan_log_probs(
    logits: Tensor,
    token_ids: Tensor,
    k: int,
    ranks: Tensor,
    top_ids: Tensor,
    top: Tensor,
    out: Tensor,
    *,
    config: Config,
) -> list[Launch]:
    """token_ids, ranks and out [B]; top_ids and top [B, k]; contiguous."""
    arguments, constants = _common(logits, config)
    arguments |= {"temperature": None, "top_k": None, "top_p": None, "min_p": None, "chosen": token_ids}
    arguments |= {"likeliest": k, "out": out, "ranks": ranks, "top_tokens": top_ids, "top": top}
    arguments["likelier"] = logits.new_empty(len(logits), constants["CHUNKS"], dtype=torch.int32)
    return _launches(("summarise", "bound", "gather", "rank"), arguments, constants, config)


def candidates(shape: Shape) -> list[Config]:
    """CHUNK: tokens of a program that reads the row; BLOCK: those looked at together by one that searches."""
    return [
        Config({"CHUNK": chunk, "BLOCK": block, "ROW_WARPS": row_warps}, warps, 1)
        for chunk, warps, block, row_warps in (
            (4096, 8, 2048, 8),
            (4096, 8, 1024, 4),
            (2048, 4, 2048, 8),
            (8192, 16, 4096, 16),
            (1024, 4, 1024, 8),
        )
    ]


def _sample_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Logits as spread as those of a language model, top_p 0.9 and temperature 0.8."""
    rows = shape["batch"]
    logits = (torch.randn(rows, shape["vocabulary"], device=device) * 3).to(dtype)

    def each(value: float, of: torch.dtype = torch.float32) -> Tensor:
        return torch.full((rows,), value, dtype=of, device=device)

    uniform = torch.rand(rows, dtype=torch.float64, device=device)
    out = torch.empty(rows, dtype=torch.int64, device=device)
    return logits, each(0.8), each(0, torch.int64), each(0.9), each(0.0), uniform, out


def _log_probs_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    logits, *_ = _sample_inputs(shape, dtype, device)
    rows, k = shape["batch"], 5
    token_ids = torch.randint(shape["vocabulary"], (rows,), device=device)
    ranks, top_ids = torch.empty_like(token_ids), torch.empty(rows, k, dtype=torch.int64, device=device)
    top = torch.empty(rows, k, device=device)
    return logits, token_ids, k, ranks, top_ids, top, torch.empty(rows, device=device)


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    elements = shape["batch"] * shape["vocabulary"]
    return Cost(bytes=elements * dtype.itemsize, flops=4 * elements)


COMPILED_SHAPES = ({"batch": 2, "vocabulary": 49152}, {"batch": 2, "vocabulary": 128256})

SAMPLE = Operator(
    name="sample",
    inputs=_sample_inputs,
    plan=plan_sample,
    candidates=candidates,
    cost=_cost,
    compiled_shapes=COMPILED_SHAPES,
    reference=lambda *inputs: reference.sample(*inputs[:-1]).float(),
)
LOG_PROBS = Operator(
    name="log_probs",
    inputs=_log_probs_inputs,
    plan=plan_log_probs,
    candidates=candidates,
    cost=_cost,
    compiled_shapes=COMPILED_SHAPES,
    reference=lambda logits, token_ids, k, *_: reference.log_probs(logits, token_ids, k)[0],
)
OPERATORS = (SAMPLE, LOG_PROBS)
