"""The importance of each calibration token for each linear, by which steps weight output errors.

It is the |g|^2 of `sensitivity`: how much the model's predictions depend on what the linear gives for that
token. The first token of a text shows why. Its inputs are larger than all others together (massive
activations, arXiv 2402.17762); o_proj and the MLP may do with them what they like, but every later token
attends to it, so that v_proj must be exact there. GuidedQuant (Kim et al., arXiv 2505.07004) weights so, too.
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
OnLayer = Callable[[int, dict[str, Sensitivity]], None]


class Importance:
    """The importance weights of all linears, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def of_layer(self, prefix: str) -> dict[str, ImportanceWeights]:
        """The weights of a layer's linears by local name; their full names begin with `prefix`."""
        with safe_open(self._path, framework="pt") as file:
            names = file.keys()
            found = {name: file.get_tensor(name) for name in names if name.startswith(prefix)}
        linears = sorted({name.rpartition(".")[0] for name in found})
        return {
            name.removeprefix(prefix): ImportanceWeights(found[f"{name}.tokens"], found[f"{name}.rows"])
            for name in linears
        }


def measure_importance(
    before: State, after: StateWriter, context: Context, on_layer: OnLayer = lambda index, found: None
) -> Importance:
    """Measures importance on the calibration text in the model before the step, or reads what an interrupted
    run measured.

    `on_layer` is called with each layer's sensitivities while they are measured, the last layer first; when
    the file is there it has been called for all of them.
    """
    path = after.directory / FILE
    if not path.is_file():
        task = context.progress.add_task("importance of tokens", total=before.num_layers)
        counts: dict[str, Tensor] = {}
        windows, device = context.calibration, context.device
        for index, found in sensitivities(before, windows, device, context.seed, after.directory):
            on_layer(index, found)
            for local, of_linear in found.items():
                name = f"{before.meta_model.prefix}{index}.{local}"
                counts[f"{name}.tokens"] = of_linear.tokens.cpu()
                counts[f"{name}.rows"] = of_linear.rows.cpu()
            context.progress.advance(task)
        write_part(path, counts)
    return Importance(path)
