"""One step of decoding with a model of the Llama family, made of the operators alone: random weights, every
linear layer, the output's too, in one format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastserve_kernels import ops
from fastserve_kernels.attention_metadata import AttentionMetadata
from fastserve_kernels.bench.graphs import capture, measure
from fastserve_kernels.bench.report import Ceilings, Row, row
from fastserve_kernels.bench.shapes import Model, group_size_for
from fastserve_kernels.formats import Dense, Int4
from fastserve_kernels.formats.prepared import Prepared
from fastserve_kernels.formats.weight import Weight
from fastserve_kernels.gpu.operator import Cost
from fastserve_kernels.kv_cache import KVCache
from fastserve_kernels.preparation import prepare

EPS = 1e-5
BLOCK_SIZE = 16
DTYPE = torch.bfloat16
CONTEXT = 1024
REPETITIONS = 21

RandomWeight = Callable[[int, int, torch.device], Weight]


def random_int4(n: int, k: int, device: torch.device) -> Int4:
    """A symmetric weight [n, k] such that products keep the variance of what they are given."""
    group = group_size_for("linear_int4", k)
    codes = torch.randint(256, (n, k // 2), dtype=torch.uint8, device=device)
    scales = torch.full((n, k // group), (21.5 * k) ** -0.5, dtype=DTYPE, device=device)
    return Int4(codes, scales, None, group)


def random_dense(n: int, k: int, device: torch.device) -> Dense:
    """A dense weight [n, k] whose products keep the variance of what they are given."""
    return Dense(torch.randn(n, k, dtype=DTYPE, device=device) * k**-0.5)


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer of a decoder; linears by name as in `Model.linears`."""

    linears: dict[str, Prepared]
    attention_norm: Tensor
    mlp_norm: Tensor
    cache: KVCache


class Decoder:
    """A model with random weights and a cache of random keys and values, one sequence of `context` tokens."""

    def __init__(
        self, model: Model, weight: RandomWeight, device: torch.device, context: int = CONTEXT
    ) -> None:
        def linear(n: int, k: int) -> Prepared:
            return prepare(weight(n, k, device), device, DTYPE)

        def ones() -> Tensor:
            return torch.ones(model.hidden, dtype=DTYPE, device=device)

        blocks = -(-context // BLOCK_SIZE)
        cache = (blocks + 1, BLOCK_SIZE, model.kv_heads, model.head_dim)
        self.model = model
        self.meta = AttentionMetadata.build([1], [context], [list(range(1, blocks + 1))], BLOCK_SIZE, device)
        self.embedding = torch.randn(model.vocabulary, model.hidden, dtype=DTYPE, device=device)
        self.layers = [
            Layer(
                {name: linear(*size) for name, size in model.linears.items()},
                ones(),
                ones(),
                KVCache(*(torch.randn(cache, dtype=DTYPE, device=device) for _ in range(2))),
            )
            for _ in range(model.layers)
        ]
        self.final_norm = ones()
        self.output = linear(model.vocabulary, model.hidden)
        angles = torch.rand(1, model.head_dim, device=device)
        self.cos, self.sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)

    def step(self) -> Tensor:
        """Takes `token` through the model: the likeliest next one [1], which becomes `token`."""
        residual = self.embedding[self.token]
        x = ops.rms_norm(residual, self.layers[0].attention_norm, EPS)
        following = [layer.attention_norm for layer in self.layers[1:]] + [self.final_norm]
        for layer, norm in zip(self.layers, following, strict=True):
            x = ops.linear(self._attend(layer, x), layer.linears["o"])
            x, residual = ops.add_rms_norm(x, residual, layer.mlp_norm, EPS)
            x = ops.linear(ops.swiglu(ops.linear(x, layer.linears["gate_up"])), layer.linears["down"])
            x, residual = ops.add_rms_norm(x, residual, norm, EPS)
        self.token.copy_(ops.linear(x, self.output).argmax(-1))
        return self.token

    def _attend(self, layer: Layer, x: Tensor) -> Tensor:
        heads, kv_heads = self.model.heads, self.model.kv_heads
        qkv = ops.linear(x, layer.linears["qkv"]).unflatten(1, (-1, self.model.head_dim))
        q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
        q = ops.rotary_write_kv(q, k, v, self.cos, self.sin, layer.cache, self.meta.slot_mapping)
        return ops.paged_attention(q, layer.cache, self.meta, self.model.head_dim**-0.5).flatten(1)

    def cost(self) -> Cost:
        """The weights but the embedding's, and the keys and values, each read once."""
        linears = [linear for layer in self.layers for linear in layer.linears.values()] + [self.output]
        weights = sum(
            argument.nbytes
            for linear in linears
            for argument in linear.arguments
            if isinstance(argument, Tensor)
        )
        flops = sum(2 * linear.out_features * linear.in_features for linear in linears)
        context = int(self.meta.context_lens[0])
        keys = context * self.model.kv_heads * self.model.head_dim * len(self.layers)
        return Cost(
            weights + 2 * keys * DTYPE.itemsize, flops + 4 * keys * self.model.heads // self.model.kv_heads
        )


def measured(name: str, model: Model, device: torch.device, machine: Ceilings) -> list[Row]:
    """int4 and bfloat16 by turns in CUDA graphs of one step, batch 1."""
    decoders = {
        "decode step int4": Decoder(model, random_int4, device),
        "decode step bf16": Decoder(model, random_dense, device),
    }
    graphs = {label: capture([decoder.step], rounds=1) for label, decoder in decoders.items()}
    times = measure(graphs, REPETITIONS)
    shape = {"batch": 1, "context": CONTEXT}
    return [
        row(
            label,
            (name, ""),
            shape,
            decoder.cost(),
            times[label],
            {other: times[other] for other in times if other != label},
            machine,
        )
        for label, decoder in decoders.items()
    ]
