"""The `config.pbtxt` files of the models that have the API's tensors, written from `api_tensors`.

python -m fastserve.ensemble.model_configs model_repository
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastserve.ensemble.api_tensors import API_INPUTS, API_OUTPUTS, TensorSpec

_INTERNAL = TensorSpec("TYPE_STRING")
"""A message between models."""
_DECOUPLED = "model_transaction_policy { decoupled: true }"
_ONE_INSTANCE = "instance_group [ { kind: KIND_CPU, count: 1 } ]"


def model_configs() -> dict[str, str]:
    """The text of each file, by the model's name."""
    return {
        "preprocess": _config(
            "Validates and tokenizes a request.",
            ['backend: "python"', "max_batch_size: 0"],
            _tensors("input", API_INPUTS, optional=True),
            _tensors("output", {"request": _INTERNAL}),
            _ONE_INSTANCE,
        ),
        "postprocess": _config(
            "Tokens to text, stop strings; sees cancelled clients. One instance: more would reorder tokens.",
            ['backend: "python"', "max_batch_size: 0", _DECOUPLED],
            _tensors("input", {"output": _INTERNAL}),
            _tensors("output", API_OUTPUTS),
            _ONE_INSTANCE,
        ),
        "fastserve": _config(
            "The way in: preprocess -> scheduler -> engine -> postprocess.",
            ['platform: "ensemble"', "max_batch_size: 0", _DECOUPLED],
            _tensors("input", API_INPUTS, optional=True),
            _tensors("output", API_OUTPUTS),
            _ensemble(),
        ),
        "fastserve_infer": _config(
            "The same contract with exactly one response, for infer() of plain HTTP and gRPC clients.",
            ['backend: "python"', "max_batch_size: 0"],
            _tensors("input", {**API_INPUTS, "cancel": TensorSpec("TYPE_STRING")}, optional=True),
            _tensors("output", API_OUTPUTS),
            _ONE_INSTANCE,
        ),
    }


def _config(purpose: str, settings: Sequence[str], inputs: str, outputs: str, last: str) -> str:
    source = "# Written by `make configs` from backend/fastserve/ensemble/api_tensors.py."
    return "\n".join([f"# {purpose}", source, *settings, inputs, outputs, last, ""])


def _tensors(kind: str, specs: Mapping[str, TensorSpec], optional: bool = False) -> str:
    suffix = ", optional: true" if optional else ""
    lines = [
        f'  {{ name: "{name}", data_type: {spec.data_type}, dims: [ {spec.length} ]{suffix} }}'
        for name, spec in specs.items()
    ]
    return "\n".join([f"{kind} [", ",\n".join(lines), "]"])


def _ensemble() -> str:
    steps = [
        _step("preprocess", {name: name for name in API_INPUTS}, {"request": "waiting_request"}),
        _step("scheduler", {"request": "waiting_request"}, {"released": "released_request"}),
        _step("engine", {"released": "released_request"}, {"output": "tokens"}),
        _step("postprocess", {"output": "tokens"}, {name: name for name in API_OUTPUTS}),
    ]
    return "\n".join(["ensemble_scheduling {", "  step [", ",\n".join(steps), "  ]", "}"])


def _step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> str:
    lines = [f'model_name: "{model}"', "model_version: -1"]
    for kind, tensors in (("input_map", inputs), ("output_map", outputs)):
        lines += [f'{kind} {{ key: "{key}", value: "{value}" }}' for key, value in tensors.items()]
    return "\n".join(["    {", *(f"      {line}" for line in lines), "    }"])


def main(repository: Path) -> None:
    """Writes the files into a model repository."""
    for model, text in model_configs().items():
        (repository / model / "config.pbtxt").write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
