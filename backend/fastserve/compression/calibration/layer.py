"""A decoder layer while it is compressed, and the statistics of the activations that reach its linears."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastserve.compression.calibration.layer_forward import LayerForward
from fastserve.compression.sparsity_patterns import mask_of
from fastserve_kernels.formats import W8A8, Weight

Stage = tuple[str, ...]
"""The local names of linears that share an input, in the order in which they run."""
TOKENS_OF_A_BATCH = 1024
"""Tokens that pass through a layer together. Four times as many took a quarter of a gigabyte more (hidden
size 576)."""


@dataclass(frozen=True)
class Moments:
    """Activation statistics of the input x of a linear: means over all calibration tokens, float32.

    Where the step weights tokens, the means are weighted by their importance for the linear.
    """

    hessian: Tensor
    """[K, K] E[x x^T]."""
    mean: Tensor
    """[K] E[x]."""
    magnitude: Tensor
    """[K] E[|x|]."""
    drift: Tensor | None
    """[K, K] E[(x_before - x) x^T], where x_before is the input in the model before this step; None unless
    the step has a reference."""
    importance: float
    """Mean weight of a token; 1 unless the step weights tokens."""
    tokens: int


@dataclass(frozen=True)
class ImportanceWeights:
    """Importance of the tokens and of the outputs of a linear."""

    tokens: Tensor
    """[samples, T] float32 |g|^2 of each token."""
    rows: Tensor
    """[N] float32 E[g_n^2] of its outputs."""


class Layer:
    """A decoder layer in float32. Its linears compute with the weights that they were given last."""

    def __init__(
        self,
        index: int,
        prefix: str,
        part: dict[str, Tensor | Weight],
        calls: LayerForward,
        hidden: Tensor,
        reference: LayerForward,
        reference_hidden: Tensor | None,
        importance: Mapping[str, ImportanceWeights] | None = None,
    ) -> None:
        """`hidden` [sequences, T, hidden] float32 are the states before the layer; `reference` is the layer
        before this step, and `reference_hidden` what enters it in the model before this step, or None.
        `importance` has the weights of tokens and outputs of each linear by local name; None: all alike."""
        self.index = index
        self.prefix = prefix
        """What the full names of its linears begin with: `model.layers.3.`"""
        self.module = calls.module
        self._part = part
        self._before = {name: weight for name, weight in part.items() if isinstance(weight, Weight)}
        self._calls = calls
        self._hidden = hidden
        self._reference = reference
        self._reference_hidden = reference_hidden
        self._importance = importance
        self._equivalents: dict[str, Tensor] = {}
        self._moments: dict[Stage, dict[str, Moments]] = {}
        self._latest: dict[Stage, dict[str, Moments]] = {}
        self.stages = self._find_stages()

    @property
    def part(self) -> dict[str, Tensor | Weight]:
        """The layer as it is now: linears as weights, norms and biases as tensors, by local name."""
        return dict(self._part)

    def weight(self, name: str) -> Weight:
        """A linear's weight as it is now."""
        found = self._part[name]
        assert isinstance(found, Weight), name
        return found

    def is_pruned(self, name: str) -> bool:
        """Whether a linear's weight is sparse, or was before this step."""
        return any(mask_of(weight) is not None for weight in (self.weight(name), self._before[name]))

    def dense(self, name: str) -> Tensor:
        """A linear's weight [N, K] float32 as it is now."""
        return self.weight(name).dequantize()

    def other(self, name: str) -> Tensor:
        """A norm or a bias, float32, by local name as it is now: `input_layernorm.weight`."""
        return self._tensor(name).float()

    def original(self, name: str) -> Tensor:
        """A linear's weight [N, K] float32 before this step, or as of the last `reset_original`."""
        if name in self._equivalents:
            return self._equivalents[name]
        weight = self._reference.module.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which dense weights are kept between steps."""
        return next(part.dtype for part in self._part.values() if isinstance(part, Tensor))

    def in_order(self, names: Container[str]) -> Iterator[str]:
        """The linears of the layer that are among the names, in the order in which they run."""
        return (name for stage in self.stages for name in stage if name in names)

    def stage_of(self, name: str) -> Stage:
        """The stage that a linear belongs to."""
        return next(stage for stage in self.stages if name in stage)

    def replace(self, name: str, weight: Weight, bias: Tensor | None = None) -> None:
        """Gives a linear another weight, and another bias if there is one."""
        linear = self.module.get_submodule(name)
        assert isinstance(linear, nn.Linear), name
        linear.weight = nn.Parameter(weight.dequantize().to(linear.weight.device), requires_grad=False)
        linear._forward_pre_hooks.clear()
        if isinstance(weight, W8A8):
            linear.register_forward_pre_hook(_round_activations)
        self._part[name] = weight
        if bias is not None:
            self.replace_other(f"{name}.bias", bias)
        self._changed(after=self.stage_of(name))

    def replace_other(self, name: str, tensor: Tensor) -> None:
        """Gives the layer another norm or bias, rounded to the dtype in which these are kept."""
        rounded = tensor.to(self._tensor(name).dtype)
        owner, _, parameter = name.rpartition(".")
        module = self.module.get_submodule(owner)
        setattr(module, parameter, nn.Parameter(rounded.float(), requires_grad=False))
        self._part[name] = rounded
        self._changed(after=None)

    def add_other(self, name: str, tensor: Tensor) -> None:
        """Gives the layer a tensor that transformers knows nothing of: a scale."""
        self._part[name] = tensor

    def reset_original(self, name: str) -> None:
        """Makes the present weight of a linear what its errors are measured against: after a change that
        another one undoes, as scaling columns and, the other way, their inputs."""
        self._equivalents[name] = self.dense(name)

    def moments(self, name: str) -> Moments:
        """Statistics of the input of a linear, with the layer as it is now."""
        stage = self.stage_of(name)
        if stage not in self._moments:
            self._moments[stage] = self._latest[stage] = self._measure(stage)
        return self._moments[stage][name]

    def latest_moments(self, name: str) -> Moments:
        """Statistics of the input of a linear that were measured last, even if the layer has changed
        since."""
        latest = self._latest.get(self.stage_of(name))
        return self.moments(name) if latest is None else latest[name]

    def run(self, hidden: Tensor) -> Tensor:
        """The output [sequences, T, hidden] of the layer as it is now for such hidden states."""
        return self._calls(hidden)

    def run_reference(self, hidden: Tensor) -> Tensor:
        """The output [sequences, T, hidden] of the layer before this step for such hidden states."""
        return self._reference(hidden)

    def inputs(self, names: tuple[str, ...], hidden: Tensor) -> tuple[Tensor, ...]:
        """What enters these modules [tokens, K], named in the order in which they run."""
        return self._calls.inputs(names, hidden)

    def reference_inputs(self, names: tuple[str, ...], hidden: Tensor) -> tuple[Tensor, ...]:
        """What enters these modules [tokens, K] of the layer before this step."""
        return self._reference.inputs(names, hidden)

    def batches(self) -> Iterator[Tensor]:
        """The hidden states before the layer, [sequences, T, hidden]: views, which may be written to when no
        more of them are needed."""
        return iter(_split(self._hidden))

    def reference_batches(self) -> Iterator[Tensor]:
        """The hidden states before the layer in the model before this step. Raises ValueError if the step has
        no reference."""
        if self._reference_hidden is None:
            raise ValueError("reference_batches needs a step that is `with_reference`")
        return iter(_split(self._reference_hidden))

    def token_weights(self, name: str) -> Iterator[Tensor]:
        """The importance [tokens, 1] of the tokens of each of the `batches` for a linear; 1 unless the step
        weights tokens."""
        if self._importance is None:
            return (batch.new_ones(batch.shape[0] * batch.shape[1], 1) for batch in self.batches())
        tokens = _split(self._importance[name].tokens)
        return (of_batch.to(self._hidden.device).view(-1, 1) for of_batch in tokens)

    def output_weights(self, name: str) -> Tensor:
        """The importance [N] of the outputs of a linear; the step must be one that weights tokens."""
        assert self._importance is not None
        return self._importance[name].rows.to(self._hidden.device)

    @torch.no_grad()
    def advance(self) -> None:
        """Passes the hidden states through the layer: they are those before the next layer then."""
        for batch in self.batches():
            batch.copy_(self.run(batch))
        if self._reference_hidden is not None:
            for batch in self.reference_batches():
                batch.copy_(self.run_reference(batch))

    def _changed(self, after: Stage | None) -> None:
        """Forgets the moments of the stages after one; of all for None."""
        keep = () if after is None else self.stages[: self.stages.index(after) + 1]
        self._moments = {stage: self._moments[stage] for stage in keep if stage in self._moments}

    @torch.no_grad()
    def _find_stages(self) -> tuple[Stage, ...]:
        """Linears that are given the very same tensor, in the order in which they run."""
        names = [name for name, part in self._part.items() if isinstance(part, Weight)]
        order: list[tuple[str, Tensor]] = []
        hooks = [
            self.module.get_submodule(name).register_forward_pre_hook(
                lambda _, given, name=name: order.append((name, given[0]))
            )
            for name in names
        ]
        self.run(self._hidden[:1])
        for hook in hooks:
            hook.remove()
        stages: list[list[str]] = []
        previous = None
        for name, given in order:
            if given is previous:
                stages[-1].append(name)
            else:
                stages.append([name])
            previous = given
        return tuple(tuple(stage) for stage in stages)

    @torch.no_grad()
    def _measure(self, stage: Stage) -> dict[str, Moments]:
        """Statistics of each linear of a stage; one for all of them where tokens weigh alike."""
        sums = {name: _Sums() for name in (stage if self._importance else stage[:1])}
        counts = zip(*(self.token_weights(name) for name in sums), strict=True)
        for index, (batch, of_batch) in enumerate(zip(self.batches(), counts, strict=True)):
            x = self._calls.input(stage[0], batch)
            before = None
            if self._reference_hidden is not None:
                before = self._reference.input(stage[0], _split(self._reference_hidden)[index])
            for of_linear, of_tokens in zip(sums.values(), of_batch, strict=True):
                of_linear.add(x, before, of_tokens)
        found = {name: of_linear.moments() for name, of_linear in sums.items()}
        return {name: found.get(name, found[stage[0]]) for name in stage}

    def _tensor(self, name: str) -> Tensor:
        found = self._part[name]
        assert isinstance(found, Tensor), name
        return found


def _split(hidden: Tensor) -> tuple[Tensor, ...]:
    return hidden.split(max(1, TOKENS_OF_A_BATCH // hidden.shape[1]))


class _Sums:
    """Importance-weighted sums over tokens."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._tokens = 0

    def add(self, x: Tensor, before: Tensor | None, counts: Tensor) -> None:
        """Adds x [tokens, K] as it is and as it was before the step, and the weights of the tokens [tokens,
        1]."""
        counted = x * counts
        found = {"hessian": x.T @ counted, "mean": counted.sum(0), "magnitude": counted.abs().sum(0)}
        found["counts"] = counts.sum()
        if before is not None:
            found["drift"] = (before - x).T @ counted
        for name, value in found.items():
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value
        self._tokens += len(x)

    def moments(self) -> Moments:
        counts = self._sums.pop("counts")
        means = {name: total / counts for name, total in self._sums.items()}
        importance = float(counts) / self._tokens
        return Moments(
            means["hessian"], means["mean"], means["magnitude"], means.get("drift"), importance, self._tokens
        )


def round_rows(x: Tensor, largest: float) -> Tensor:
    """The rows of x [..., K], each rounded to steps of max|x| / largest: 8 bits, as `W8A8` has activations
    (127) and weights (127.5)."""
    steps = (x.abs().amax(-1, keepdim=True) / largest).clamp(min=torch.finfo(x.dtype).tiny)
    return (x / steps).round().clamp(-128, 127) * steps


def _round_activations(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (round_rows(given[0], 127), *given[1:])
