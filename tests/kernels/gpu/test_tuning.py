"""The files of tuned configs, and which config a shape gets."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastserve_kernels.bench.graphs import Graph
from fastserve_kernels.bench.statistics import Samples
from fastserve_kernels.commands import tune
from fastserve_kernels.gpu import tuning
from fastserve_kernels.gpu.launch import Config, Launch
from fastserve_kernels.gpu.operator import Cost, Operator, Shape
from fastserve_kernels.gpu.registry import operators
from fastserve_kernels.gpu.tuning import Entry, TunedConfigs, config_for, distance, load, save

GPU = torch.device("cuda", 0)
SMALL, LARGE, HUGE = (Config({"BLOCK": size}, 4, 3) for size in (16, 64, 256))


def candidates(shape: Shape) -> list[Config]:
    """No block is wider than the matrix."""
    return [config for config in (LARGE, SMALL, HUGE) if config.constants["BLOCK"] <= shape["n"]]


TOY = Operator(
    name="toy",
    inputs=lambda shape, dtype, device: (),
    plan=lambda **_: [],
    candidates=candidates,
    cost=lambda shape, dtype: Cost(1, 1),
    compiled_shapes=({"m": 1, "n": 64},),
)


def entry(m: int, n: int, config: Config) -> Entry:
    return Entry({"m": m, "n": n}, config, 7.25, "2026-11-20")


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes the entries given those of this machine's GPU."""

    def clear() -> None:
        tuning._chosen.clear()
        tuning._warn_once.cache_clear()

    def put(*entries: Entry) -> None:
        monkeypatch.setattr(tuning, "tuned_for", lambda name: TunedConfigs(name, {"toy": list(entries)}))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
        clear()

    yield put
    clear()


def test_exact_entry(tuned: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    tuned(entry(1, 64, SMALL), entry(16, 64, LARGE))
    assert config_for(TOY, {"m": 1, "n": 64}, GPU) == SMALL
    assert config_for(TOY, {"m": 16, "n": 64}, GPU) == LARGE
    assert not caplog.records


def test_nearest_entry_is_said_once(tuned: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    tuned(entry(1, 512, HUGE), entry(1, 96, SMALL))
    for m in (1, 2, 1):
        assert config_for(TOY, {"m": m, "n": 128}, GPU) == SMALL
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "toy" in caplog.text
    assert "'n': 128" in caplog.text


def test_number_of_tokens_between_two_tuned_ones(
    tuned: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    tuned(entry(4, 64, SMALL), entry(32, 64, LARGE))
    assert config_for(TOY, {"m": 5, "n": 64}, GPU) == SMALL
    assert config_for(TOY, {"m": 20, "n": 64}, GPU) == LARGE
    assert config_for(TOY, {"m": 0, "n": 64}, GPU) == SMALL
    assert not caplog.records


def test_config_that_does_not_suit_a_shape_is_passed_over(tuned: Callable[..., None]) -> None:
    tuned(entry(1, 256, HUGE), entry(1, 4096, SMALL))
    assert config_for(TOY, {"m": 1, "n": 128}, GPU) == SMALL


def test_default_is_said_once(tuned: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    tuned()
    for m in (1, 2):
        assert config_for(TOY, {"m": m, "n": 64}, GPU) == LARGE
    assert len(caplog.records) == 1


def test_interpreted_takes_the_default_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    assert config_for(TOY, {"m": 3, "n": 32}, torch.device("cpu")) == SMALL
    assert not caplog.records


def test_choice_is_made_once(tuned: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(entry(1, 64, SMALL))
    assert config_for(TOY, {"m": 1, "n": 64}, GPU) == SMALL
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: pytest.fail("asked again"))
    assert config_for(TOY, {"m": 1, "n": 64}, GPU) == SMALL


def test_distance() -> None:
    assert distance({"m": 1, "n": 64}, {"m": 8, "n": 32}) == 4
    assert distance({"m": 1, "n": 64}, {"m": 8, "k": 32}) == float("inf")


def test_file_name() -> None:
    assert tuning.file_name("NVIDIA H200") == "nvidia-h200.json"
    assert tuning.file_name("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb.json"


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "tuned" / "nvidia-h200.json"
    contents = TunedConfigs("NVIDIA H200", {})
    contents.put("toy", entry(1, 64, LARGE))
    contents.put("toy", entry(16, 64, LARGE))
    contents.put("toy", entry(1, 64, SMALL))
    assert contents.has("toy", {"n": 64, "m": 1})
    assert not contents.has("toy", {"n": 64, "m": 2})
    assert not contents.has("other", {"n": 64, "m": 1})
    save(contents, path)
    assert load(path) == replace(contents, entries={"toy": [entry(1, 64, SMALL), entry(16, 64, LARGE)]})
    assert sum("microseconds" in line for line in path.read_text().splitlines()) == 2
    assert list(tuning.all_tuned(path.parent)) == ["nvidia-h200.json"]


def document(**changes: Any) -> dict[str, Any]:
    one = {
        "shape": {"m": 1},
        "constants": {"BLOCK": 16},
        "num_warps": 4,
        "num_stages": 3,
        "microseconds": 7.1,
        "date": "2026-11-20",
    }
    return {"schema": 1, "device": "NVIDIA H200", "operators": {"toy": [{**one, **changes}]}}


@pytest.mark.parametrize(
    ("contents", "complaint"),
    [
        ([], "the file: got []"),
        ({**document(), "schema": 2}, "schema: got 2, this version reads 1"),
        ({**document(), "device": 3}, "device: got 3"),
        ({**document(), "more": 3}, "the file: has"),
        ({**document(), "operators": {"toy": {}}}, "operators.toy: got {}, must be a list"),
        (document(num_warps=0), r"operators.toy[0].num_warps: got 0"),
        (document(num_stages=True), r"operators.toy[0].num_stages: got True"),
        (document(shape={"m": 1.5}), r"operators.toy[0].shape.m: got 1.5"),
        (document(constants={"BLOCK": "16"}), r"operators.toy[0].constants.BLOCK: got '16'"),
        (document(microseconds=0), r"operators.toy[0].microseconds: got 0"),
        (document(date="today"), r"operators.toy[0].date: got 'today'"),
        (document(speed=3), r"operators.toy[0]: has"),
    ],
)
def test_malformed_file(tmp_path: Path, contents: object, complaint: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=r"gpu\.json") as raised:
        load(path)
    assert complaint in str(raised.value)


def test_file_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text('{"schema": 1')
    with pytest.raises(ValueError, match=r"gpu\.json: not JSON"):
        load(path)


def test_tuned_configs_are_candidates_still() -> None:
    """A kernel that changes its constants must be tuned again."""
    known = {operator.name: operator for operator in operators()}
    for name, contents in tuning.all_tuned().items():
        for operator, entries in contents.entries.items():
            for one in entries:
                place = f"{name}: {operator} {dict(one.shape)}"
                assert one.config in known[operator].candidates(one.shape), place


def test_successive_halving_finds_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def measure(graphs: Mapping[str, Graph], repetitions: int) -> dict[str, Samples]:
        asked.append((len(graphs), repetitions))
        return {name: Samples((abs(int(name) - 17) * 1e-6 + 1e-6,) * repetitions) for name in graphs}

    monkeypatch.setattr(tune, "measure", measure)
    best, times = tune.fastest({index: Graph(None, []) for index in range(40)})  # type: ignore[arg-type]
    assert best == 17
    assert times[17] == pytest.approx(1)
    assert times[0] == pytest.approx(18)
    assert [count for count, _ in asked] == [40, 12, 4]


class Filling:
    """In place of a kernel: fills the first `count` elements."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(out: torch.Tensor, value: float, count: int, **_: int) -> None:
            out[:count] = value

        return launch


def test_wrong_and_partial_results_are_found() -> None:
    def plan(out: torch.Tensor, *, config: Config) -> list[Launch]:
        value, count = config.constants["VALUE"], config.constants["COUNT"]
        return [Launch(Filling(), (1,), {"out": out, "value": value, "count": count}, {})]

    configs = [Config({"VALUE": value, "COUNT": count}) for value, count in ((3, 8), (4, 8), (3, 7), (3, 8))]
    judged = replace(TOY, plan=plan, reference=lambda out: torch.full((8,), 3.0))
    right, wrong = tune.that_are_right(judged, configs, (torch.zeros(8),))
    assert right == [configs[0], configs[3]]
    assert wrong == configs[1:3]
    unjudged = replace(judged, reference=None)
    assert tune.that_are_right(unjudged, configs[1:], (torch.zeros(8),))[1] == configs[2:]


def test_relative_error_of_what_is_not_written() -> None:
    nan = float("nan")
    assert tune.relative_error(torch.tensor([nan, 1.0]), torch.tensor([1.0, 1.0])) == float("inf")
    assert tune.relative_error(torch.tensor([nan, 1.0]), torch.tensor([nan, 1.0])) == 0
    assert tune.relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
