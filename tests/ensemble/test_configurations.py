"""The models' configurations agree with one another and with the code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from fastserve.ensemble.api_tensors import API_INPUTS
from fastserve.ensemble.model_configs import main, model_configs
from fastserve.launcher.repository import model_names, model_repository
from fastserve.text import input_processor as input_processor
from fastserve_client.request import cancellation_request, generation_request


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


@pytest.mark.parametrize("model", model_configs())
def test_the_files_are_those_written_from_the_tables(model: str) -> None:
    text = (model_repository() / model / "config.pbtxt").read_text()
    assert text == model_configs()[model], "run `make configs`"


def test_the_files_are_written_where_they_belong(tmp_path: Path) -> None:
    for model in model_configs():
        (tmp_path / model).mkdir()
    main(tmp_path)
    for model, text in model_configs().items():
        assert (tmp_path / model / "config.pbtxt").read_text() == text


@pytest.mark.parametrize(
    ("model", "more"), [("preprocess", []), ("fastserve", []), ("fastserve_infer", ["cancel"])]
)
def test_triton_server_reads_what_the_tables_say(model: str, more: list[str]) -> None:
    declared = {name: (spec.data_type, [spec.length], True) for name, spec in API_INPUTS.items()}
    declared |= {name: ("TYPE_STRING", [1], True) for name in more}
    assert inputs_of(model) == declared


def test_the_code_that_reads_them_and_the_client_know_no_others() -> None:
    assert set(API_INPUTS) == input_processor._INPUT_NAMES
    sent = [
        generation_request("x", True, {"tenant": "x", "seed": 1, "expected_output_tokens": 3}),
        generation_request(None, True, {"messages": [], "tenant": "x", "return_timing": True}),
        generation_request(None, True, {"prompt_token_ids": [1], "tenant": "x"}),
    ]
    assert set().union(*(request.inputs for request in sent)) == set(API_INPUTS)
    assert set(cancellation_request("id").inputs) == {"cancel"}


def test_the_client_sends_the_types_that_are_declared() -> None:
    for prompt in ({"text_input": "x"}, {"messages": "[]"}, {"prompt_token_ids": [1]}):
        request = generation_request(None, True, {"tenant": "x", "seed": 1, "expected_output_tokens": 3})
        message = replace(request, inputs={**request.inputs, **prompt}).to_grpc(None)
        for tensor in message.inputs:
            data_type = API_INPUTS[tensor.name].data_type.removeprefix("TYPE_")
            assert tensor.datatype == {"STRING": "BYTES"}.get(data_type, data_type), tensor.name
            assert list(tensor.shape) == [1]


def test_the_options_of_the_client_are_inputs_sampling_parameters_or_fields_of_the_request() -> None:
    from fastserve_client.options import Options

    of_the_call = {"request_id", "headers"}
    known = {*API_INPUTS, *input_processor._PARAMETER_NAMES, *of_the_call}
    assert set(Options.__annotations__) <= known


def test_both_ways_in_and_the_last_model_have_the_same_outputs() -> None:
    assert outputs_of("fastserve") == outputs_of("fastserve_infer") == outputs_of("postprocess")


def test_an_ensemble_gives_every_model_what_it_has_and_takes_what_it_gives() -> None:
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
