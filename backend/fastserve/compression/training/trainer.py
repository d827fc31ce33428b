"""The training loop: AdamW on windows of text, to a budget of steps or of minutes.

What trains is in float32, and so is what the optimizer keeps; matrix products are in bfloat16 where the
device multiplies that faster. Nothing but the order of the windows is random, and that depends on the seed
and the step alone: a run of so many steps ends in the same bytes, also if it was killed on the way and goes
on from its checkpoint.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from fastserve.atomic_write import atomic_write
from fastserve.compression.state.model_state import SCRATCH
from fastserve.compression.training.training_plan import TrainingPlan

MICRO_TOKENS = 1024
"""Tokens that go through the model at once; the gradients of a larger batch are summed up."""
CHECKPOINT_SECONDS = 300
"""Seconds between two checkpoints."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_THRESHOLD = 32 << 20
"""Bytes of an allocation that still come from the heap; glibc refuses more."""
CHECKPOINT, BEST = f"{SCRATCH}checkpoint.pt", f"{SCRATCH}best.pt"

Loss = Callable[[Tensor], Tensor]
"""Maps windows [n, T] int64 to their mean loss."""


@dataclass(frozen=True)
class CurvePoint:
    """A point of a training curve."""

    step: int
    tokens: int
    minutes: float
    training: float | None
    """The mean loss of the steps since the last point; None before the first step."""
    held_out: float


class Trainer:
    """A run of the loop, which its directory outlives."""

    def __init__(
        self,
        plan: TrainingPlan,
        parameters: dict[str, nn.Parameter],
        loss: Loss,
        directory: Path,
        seed: int,
        mask_gradients: Callable[[], None] = lambda: None,
    ) -> None:
        """`mask_gradients` drops gradients of what must not change, before each step."""
        self._plan = plan
        self._parameters = parameters
        self._loss = loss
        self._directory = directory
        self._seed = seed
        self._mask_gradients = mask_gradients
        self._optimizer = _optimizer(parameters, plan.weight_decay)
        self._points: list[CurvePoint] = []
        self._step = 0
        self._minutes = 0.0
        self._recent: list[float] = []
        self._saved = time.monotonic()

    def run(self, text: Tensor, held_out: Tensor, progress: Progress) -> list[CurvePoint]:
        """Trains on `text` [samples, T], and leaves the parameters as they did best on `held_out`, which is
        shaped alike. Returns the curve.
        """
        keep_freed_memory()
        self._resume()
        task = progress.add_task(self._plan.name, total=1.0)
        started = time.process_time() / 60 - self._minutes
        while not self._is_finished():
            progress.update(task, completed=self._done())
            if self._done() * self._plan.evaluations >= len(self._points):
                self._evaluate(text, held_out)
            else:
                self._take_step(text)
            self._minutes = time.process_time() / 60 - started
            if time.monotonic() > self._saved + CHECKPOINT_SECONDS:
                self._save_checkpoint()
        self._save_checkpoint()
        self._load(torch.load(self._directory / BEST, weights_only=True))
        return self._points

    def _done(self) -> float:
        """Share of the budget that is spent."""
        plan = self._plan
        return self._step / plan.steps if plan.steps else min(1.0, self._minutes / (plan.minutes or 1.0))

    def _is_finished(self) -> bool:
        """Whether the last evaluation was at the end of the budget, or so many in vain."""
        losses = [point.held_out for point in self._points]
        if not losses:
            return False
        in_vain = len(losses) - 1 - losses.index(min(losses))
        at_the_end = self._done() >= 1 and self._points[-1].step == self._step
        return at_the_end or in_vain >= self._plan.patience

    def _take_step(self, text: Tensor) -> None:
        windows = text[window_order(self._step, self._plan.batch, len(text), self._seed)]
        total = 0.0
        for some in windows.split(max(1, MICRO_TOKENS // text.shape[1])):
            loss = self._loss(some) * (len(some) / len(windows))
            loss.backward()
            total += float(loss.detach())
        self._mask_gradients()
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._plan.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = self._plan.rate(self._done())
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._recent.append(total)
        self._step += 1

    @torch.no_grad()
    def _evaluate(self, text: Tensor, held_out: Tensor) -> None:
        found = [float(self._loss(window[None])) for window in held_out]
        recent = sum(self._recent) / len(self._recent) if self._recent else None
        tokens = self._step * self._plan.batch * text.shape[1]
        point = CurvePoint(self._step, tokens, self._minutes, recent, sum(found) / len(found))
        if all(point.held_out < earlier.held_out for earlier in self._points):
            _save(self._directory / BEST, self._tensors())
        self._points.append(point)
        self._recent = []

    def _tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def _load(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])

    def _save_checkpoint(self) -> None:
        checkpoint = {
            "parameters": self._tensors(),
            "optimizer": self._optimizer.state_dict(),
            "points": [asdict(point) for point in self._points],
            "step": self._step,
            "minutes": self._minutes,
            "recent": self._recent,
        }
        _save(self._directory / CHECKPOINT, checkpoint)
        self._saved = time.monotonic()

    def _resume(self) -> None:
        if not (self._directory / CHECKPOINT).is_file():
            return
        checkpoint = torch.load(self._directory / CHECKPOINT, weights_only=True)
        self._load(checkpoint["parameters"])
        self._optimizer.load_state_dict(checkpoint["optimizer"])
        self._points = [CurvePoint(**point) for point in checkpoint["points"]]
        self._step, self._minutes = checkpoint["step"], checkpoint["minutes"]
        self._recent = checkpoint["recent"]


def _optimizer(parameters: dict[str, nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """Norms and biases do not decay."""
    matrices = [parameter for parameter in parameters.values() if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters.values() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def keep_freed_memory() -> None:
    """Has glibc give the next step the memory of the last one, in place of the kernel's fresh pages: clearing
    those took as long as the products (virtual machine, 1,024 tokens a step)."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def window_order(step: int, batch: int, samples: int, seed: int) -> Tensor:
    """The indices [batch] int64 of the windows of a step: all windows shuffled, then all shuffled
    otherwise."""
    places = range(step * batch, (step + 1) * batch)
    epochs = {place // samples for place in places}
    orders = {epoch: _shuffled(samples, seed, epoch) for epoch in epochs}
    return torch.stack([orders[place // samples][place % samples] for place in places])


def _shuffled(samples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))


def _save(path: Path, value: Any) -> None:
    """Writes a file of torch's, whole or not at all. Raises WriteError."""
    # Through a file of Python's: given a path, torch does not say why it could not write.
    with atomic_write(path) as unfinished, open(unfinished, "wb") as file:
        torch.save(value, file)
