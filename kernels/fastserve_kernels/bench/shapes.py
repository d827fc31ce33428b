"""The shapes that operators are tuned for and measured at: those of whole models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastserve_kernels.gpu.operator import Operator, Shape

ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 2048)
"""Tokens of a step."""
CONTEXT = 4096
BLOCK_SIZE = 16
"""Tokens of a block of a paged cache."""
BLOCK = 64
"""Rows and columns of a block of a block-sparse weight; it divides every model's."""
MAX_SEQUENCES = 256
ENCODED_TOKENS = 64
"""Of a text that an encoder reads."""


@dataclass(frozen=True)
class Model:
    """A decoder of the Llama family, or one GPU's part of it."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """(N, K) of the linear layers, q, k and v as one and gate and up as one."""
        attention = self.heads * self.head_dim
        return {
            "qkv": (attention + 2 * self.kv_heads * self.head_dim, self.hidden),
            "o": (self.hidden, attention),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


MODELS = {
    "llama-3-8b": Model(4096, 14336, 32, 8, 128, 32, 128256),
    "llama-3-70b/8": Model(8192, 28672 // 8, 64 // 8, 8 // 8, 128, 80, 128256 // 8),
    "smollm2": Model(576, 1536, 9, 3, 64, 30, 49152),
}
"""By the name on the command line; /8: one of eight GPUs that share the model's matrices."""


@dataclass(frozen=True)
class Case:
    """An operator at a shape."""

    operator: Operator
    model: str
    part: str
    """The linear layer; "" for an operator of another kind."""
    shape: Shape
    variant: str
    """Sizes that no model decides: "cache_format=2"."""

    @property
    def name(self) -> str:
        """The name of the operator, and its variant."""
        return f"{self.operator.name} {self.variant}".strip()

    @property
    def cold(self) -> bool:
        """Whether what it reads is too much to be in the cache: weights, keys and values. What the other
        operators read was written a moment ago."""
        return self.operator.name.startswith(("linear", "paged_attention"))

    @property
    def label(self) -> str:
        """The case for people, as in the reports."""
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        return " ".join(word for word in (self.model, self.part, sizes) if word)


def model_named(name: str) -> Model:
    """Raises ValueError for an unknown name."""
    if name not in MODELS:
        raise ValueError(f"shapes {name!r}: no such model; there are {', '.join(MODELS)}")
    return MODELS[name]


def group_size_for(operator: str, k: int) -> int:
    """Columns that share a scale, as is customary: all, or else the most that divide K."""
    if operator in ("linear_int8", "linear_fp8"):
        return k
    most = 64 if operator == "linear_nf4" else 128
    return next(size for size in (128, 64, 32) if size <= most and k % size == 0)


def cases(operators: Sequence[Operator], models: Sequence[str], rows: Sequence[int]) -> list[Case]:
    """Every operator at every model's shapes, so ordered that the first ones matter most."""
    return [
        case
        for name in models
        for m in rows
        for operator in operators
        for case in _cases_of(operator, name, m)
    ]


def _cases_of(operator: Operator, name: str, m: int) -> list[Case]:
    """One for each linear layer, and for each way that the operator's small shapes differ otherwise."""
    found: list[Case] = []
    smalls = [{**small, **other} for small in operator.compiled_shapes for other in _others(operator.name)]
    for part, sizes in _sizes(operator.name, model_named(name), m).items():
        for small in smalls:
            shape = {key: sizes.get(key, size) for key, size in small.items()}
            variant = " ".join(f"{key}={size}" for key, size in small.items() if key not in sizes)
            if all(case.part != part or case.shape != shape for case in found):
                found.append(Case(operator, name, part, shape, variant))
    return found


def _others(operator: str) -> list[dict[str, int]]:
    """What is measured beside the small shapes: blocks of which a half, or four in five, are left out."""
    return [{"percent": 50}, {"percent": 20}] if operator == "linear_block_sparse" else [{}]


def _sizes(operator: str, model: Model, m: int) -> dict[str, dict[str, int]]:
    """What a model and m tokens decide of an operator's shape, by linear layer, or under "".

    Nothing where the operator has no such step: a batch of more sequences than memory holds, a prompt of one
    token.
    """
    if operator.startswith("linear"):
        return {
            part: {
                "m": m,
                "n": n,
                "k": k,
                "zeros": 0,
                "group_size": group_size_for(operator, k),
                "block_n": BLOCK,
                "block_k": BLOCK,
            }
            for part, (n, k) in model.linears.items()
        }
    heads = {"heads": model.heads, "kv_heads": model.kv_heads, "dim": model.head_dim}
    if operator == "rotary_write_kv":
        return {"": {"tokens": m, **heads}}
    if operator in ("sample", "log_probs"):
        return {"": {"batch": m, "vocabulary": model.vocabulary}} if m <= MAX_SEQUENCES else {}
    if operator == "paged_attention_decode":
        paged = {"context": CONTEXT, **heads, "dim_v": model.head_dim, "block_size": BLOCK_SIZE}
        return {"": {"batch": m, "tokens": m, **paged}} if m <= MAX_SEQUENCES else {}
    if operator == "paged_attention_prefill":
        paged = {"context": CONTEXT, **heads, "dim_v": model.head_dim, "block_size": BLOCK_SIZE}
        # Up to 16 tokens of a sequence may be decode's.
        return {"": {"batch": 1, "tokens": m, **paged}} if m > 16 else {}
    if operator == "varlen_attention":
        # An encoder's: all heads have keys of their own.
        batch = max(1, m // ENCODED_TOKENS)
        return {"": {"batch": batch, "tokens": m, "heads": model.heads, "dim": model.head_dim}}
    return {"": {"tokens": m, "dim": model.intermediate if operator == "swiglu" else model.hidden}}
