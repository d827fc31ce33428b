"""The models' configurations agree with one another and with the code."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from fastserve.launcher.repository import model_names, model_repository
from fastserve.text import input_processor as input_processor
from fastserve_client import Options
from fastserve_client.request import generation_request


def configuration(model: str) -> Any:
    text = (model_repository() / model / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def inputs_of(model: str) -> dict[str, tuple[str, list[int], bool]]:
    return {
        each.name: (model_config_pb2.DataType.Name(each.data_type), list(each.dims), each.optional)
        for each in configuration(model).input
    }


def outputs_of(model: str) -> dict[str, tuple[int, list[int]]]:
    return {each.name: (each.data_type, list(each.dims)) for each in configuration(model).output}


@pytest.mark.parametrize(
    ("model", "own"),
    [
        ("preprocess", {}),
        ("fastserve", {}),
        ("fastserve_infer", {"cancel": ("TYPE_STRING", [1], True)}),
    ],
)
def test_the_inputs_of_the_api_are_declared_alike(pb_utils: Any, model: str, own: dict[str, Any]) -> None:
    from fastserve.ensemble.inputs import API_INPUTS, MANY

    declared = {name: (kind, [-1 if name in MANY else 1], True) for name, kind in API_INPUTS.items()}
    assert inputs_of(model) == declared | own


def test_the_code_that_reads_them_and_the_client_know_no_others(pb_utils: Any) -> None:
    from fastserve.ensemble.inputs import API_INPUTS

    assert set(API_INPUTS) == input_processor._INPUT_NAMES
    prompts: list[Options] = [{}, {"messages": []}, {"prompt_token_ids": [1]}]
    sent = [generation_request("x", True, {"tenant": "x", "seed": 1, **prompt}) for prompt in prompts]
    assert set().union(*(request.inputs for request in sent)) == set(API_INPUTS)


def test_both_doors_and_the_last_step_have_the_same_outputs() -> None:
    assert outputs_of("fastserve") == outputs_of("fastserve_infer") == outputs_of("postprocess")


def test_an_ensemble_gives_every_step_what_it_has_and_takes_what_it_gives() -> None:
    ensemble = configuration("fastserve")
    for step in ensemble.ensemble_scheduling.step:
        given = set(step.input_map)
        assert given <= set(inputs_of(step.model_name))
        assert set(step.output_map) == set(outputs_of(step.model_name))
    first = ensemble.ensemble_scheduling.step[0]
    assert dict(first.input_map) == {name: name for name in inputs_of("fastserve")}


def test_every_model_has_one_instance() -> None:
    for model in model_names(model_repository()):
        configured = configuration(model)
        if configured.backend == "python":
            assert [each.count for each in configured.instance_group] == [1], model
