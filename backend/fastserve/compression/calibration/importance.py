"""What each token of the calibration text counts for each linear, in the steps that weigh errors of outputs.

It is the |g|^2 of `sensitivity`: how much the model's predictions depend on what the linear gives for that
token. The first token of a text shows why. Its inputs are larger than all others together (massive
activations, arXiv 2402.17762); o_proj and the MLP may do with them what they like, but every later token
attends to it, so that v_proj must be exact there. GuidedQuant (Kim et al., arXiv 2505.07004) weighs so, too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from fastserve.compression.calibration.layer import ImportanceWeights
from fastserve.compression.calibration.sensitivity import Sensitivity, sensitivities
from fastserve.compression.state.model_state import SCRATCH, State, StateWriter, write_part
from fastserve.compression.step import Context

FILE = f"{SCRATCH}importance.safetensors"
See = Callable[[int, dict[str, Sensitivity]], None]


class Importance:
    """Of all linears, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def of_layer(self, prefix: str) -> dict[str, ImportanceWeights]:
        """By local name, of a layer whose full names begin with `prefix`."""
        with safe_open(self._path, framework="pt") as file:
            names = file.keys()
            found = {name: file.get_tensor(name) for name in names if name.startswith(prefix)}
        linears = sorted({name.rpartition(".")[0] for name in found})
        return {
            name.removeprefix(prefix): ImportanceWeights(found[f"{name}.tokens"], found[f"{name}.rows"])
            for name in linears
        }


def measure_importance(
    before: State, after: StateWriter, context: Context, see: See = lambda index, found: None
) -> Importance:
    """On the calibration text, in the model before the step; an interrupted run's if that came so far.

    `see` is given each layer's sensitivities while they are measured, the last layer first; when the file is
    there it has been given all of them.
    """
    path = after.directory / FILE
    if not path.is_file():
        task = context.progress.add_task("importance of tokens", total=before.num_layers)
        counts: dict[str, Tensor] = {}
        windows, device = context.calibration, context.device
        for index, found in sensitivities(before, windows, device, context.seed, after.directory):
            see(index, found)
            for local, of_linear in found.items():
                name = f"{before.meta_model.prefix}{index}.{local}"
                counts[f"{name}.tokens"] = of_linear.tokens.cpu()
                counts[f"{name}.rows"] = of_linear.rows.cpu()
            context.progress.advance(task)
        write_part(path, counts)
    return Importance(path)
