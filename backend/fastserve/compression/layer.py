"""A decoder layer while it is compressed, and what the calibration text looks like where it enters it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastserve_kernels.formats import W8A8, Weight

Stage = tuple[str, ...]
"""The local names of linears that share an input."""
LOUDEST = 8.0
"""Times the median of a batch's tokens that the square of one may count. The first token of a text can have
a thousand times as much (massive activations, arXiv 2402.17762), and all others would hardly count beside
it, though the next norm takes it off again."""
TOKENS_OF_A_BATCH = 4096
"""Whose hidden states pass through a layer together."""


@dataclass(frozen=True)
class Moments:
    """Of the input x of the linears of a stage, means over all calibration tokens, float32."""

    gram: Tensor
    """[K, K] E[x x^T]."""
    mean: Tensor
    """[K] E[x]."""
    magnitude: Tensor
    """[K] E[|x|]."""
    drift: Tensor | None
    """[K, K] E[(x_before - x) x^T], where x_before is the input in the model before this step; None unless
    the step has a reference."""
    tokens: int


class Calls:
    """A layer's weights in a module of transformers, and how that is called."""

    def __init__(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        self.module = module
        self._arguments = arguments

    def __call__(self, hidden: Tensor) -> Tensor:
        """The layer's output [sequences, T, hidden] for such hidden states."""
        out = self.module(hidden, **self._arguments)
        return out[0] if isinstance(out, tuple) else out

    def input(self, name: str, hidden: Tensor) -> Tensor:
        """What enters a module [tokens, K] while `hidden` passes through the layer; it goes no further."""
        return self.inputs((name,), hidden)[0]

    def inputs(self, names: tuple[str, ...], hidden: Tensor) -> tuple[Tensor, ...]:
        """The same of several, in the order in which they run."""
        seen: list[Tensor] = []

        def note(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen.append(given[0].flatten(0, -2))
            if len(seen) == len(names):
                raise _Seen

        hooks = [
            self.module.get_submodule(name).register_forward_pre_hook(note, prepend=True) for name in names
        ]
        try:
            self(hidden)
        except _Seen:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return tuple(seen)


class _Seen(Exception):
    """Ends a pass through a layer as soon as it has shown what it is for."""


class Layer:
    """A decoder layer in float32. Its linears compute with the weights that they were given last."""

    def __init__(
        self,
        index: int,
        prefix: str,
        part: dict[str, Tensor | Weight],
        calls: Calls,
        hidden: Tensor,
        reference: Calls,
        reference_hidden: Tensor | None,
    ) -> None:
        """`hidden` [sequences, T, hidden] float32 are the states before the layer; `reference` is the layer
        before this step, and `reference_hidden` what enters it in the model before this step, or None."""
        self.index = index
        self.prefix = prefix
        """Of full names: `model.layers.3.`"""
        self.module = calls.module
        self._part = part
        self._calls = calls
        self._hidden = hidden
        self._reference = reference
        self._reference_hidden = reference_hidden
        self._equivalents: dict[str, Tensor] = {}
        self._moments: dict[Stage, Moments] = {}
        self._latest: dict[Stage, Moments] = {}
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

    def dense(self, name: str) -> Tensor:
        """A linear's weight [N, K] float32 as it is now."""
        return self.weight(name).dequantize()

    def other(self, name: str) -> Tensor:
        """A norm or a bias, float32, as it is now: `input_layernorm.weight`."""
        return self._tensor(name).float()

    def original(self, name: str) -> Tensor:
        """A linear's weight [N, K] float32 before this step, or when it was last taken for that."""
        if name in self._equivalents:
            return self._equivalents[name]
        weight = self._reference.module.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def dtype(self) -> torch.dtype:
        """In which dense weights are kept between steps."""
        return next(part.dtype for part in self._part.values() if isinstance(part, Tensor))

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

    def take_for_original(self, name: str) -> None:
        """From now on errors of a linear are measured against what it is now. For a change that another one
        undoes: of columns whose inputs are scaled the other way."""
        self._equivalents[name] = self.dense(name)

    def moments(self, stage: Stage) -> Moments:
        """Of the input that the linears of a stage share, with the layer as it is now."""
        if stage not in self._moments:
            self._moments[stage] = self._latest[stage] = self._measure(stage)
        return self._moments[stage]

    def latest_moments(self, stage: Stage) -> Moments:
        """Those that were measured last, even if the layer has changed since."""
        return self._latest[stage] if stage in self._latest else self.moments(stage)

    def run(self, hidden: Tensor) -> Tensor:
        """The output [sequences, T, hidden] of the layer as it is now for such hidden states."""
        return self._calls(hidden)

    def run_reference(self, hidden: Tensor) -> Tensor:
        """The same of the layer before this step."""
        return self._reference(hidden)

    def inputs(self, names: tuple[str, ...], hidden: Tensor) -> tuple[Tensor, ...]:
        """What enters these modules [tokens, K], named in the order in which they run."""
        return self._calls.inputs(names, hidden)

    def reference_inputs(self, names: tuple[str, ...], hidden: Tensor) -> tuple[Tensor, ...]:
        """The same of the layer before this step."""
        return self._reference.inputs(names, hidden)

    def batches(self) -> Iterator[Tensor]:
        """The hidden states before the layer, [sequences, T, hidden]: views, which may be written to when no
        more of them are needed."""
        return iter(_split(self._hidden))

    def reference_batches(self) -> Iterator[Tensor]:
        """Those before it in the model before this step, if the step has a reference."""
        if self._reference_hidden is None:
            raise ValueError("reference_batches needs a step that is `with_reference`")
        return iter(_split(self._reference_hidden))

    @torch.no_grad()
    def advance(self) -> None:
        """Lets the hidden states pass through: they are those before the next layer now."""
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
    def _measure(self, stage: Stage) -> Moments:
        sums: dict[str, Tensor] = {}
        tokens = 0
        for index, batch in enumerate(self.batches()):
            x = self._calls.input(stage[0], batch)
            share = _quietened(x)
            x = x * share
            found = {"gram": x.T @ x, "mean": x.sum(0), "magnitude": x.abs().sum(0)}
            if self._reference_hidden is not None:
                before = _split(self._reference_hidden)[index]
                found["drift"] = (self._reference.input(stage[0], before) * share - x).T @ x
            for name, value in found.items():
                sums[name] = sums[name] + value if name in sums else value
            tokens += len(x)
        means = {name: total / tokens for name, total in sums.items()}
        return Moments(means["gram"], means["mean"], means["magnitude"], means.get("drift"), tokens)

    def _tensor(self, name: str) -> Tensor:
        found = self._part[name]
        assert isinstance(found, Tensor), name
        return found


def _split(hidden: Tensor) -> tuple[Tensor, ...]:
    return hidden.split(max(1, TOKENS_OF_A_BATCH // hidden.shape[1]))


def _quietened(x: Tensor) -> Tensor:
    """The factor [tokens, 1] for each token of x [tokens, K] that leaves none louder than LOUDEST."""
    loudness = x.square().sum(1, keepdim=True)
    return (LOUDEST * loudness.median() / loudness.clamp_min(1e-30)).clamp(max=1).sqrt()


def _round_activations(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As the operator of `W8A8` rounds each token: to 8 bits, symmetric."""
    x = given[0]
    step = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
    return ((x / step).round() * step, *given[1:])
