"""The arithmetic of the benchmark, its shapes, and a small run of it on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastserve_kernels.bench import cpu, decode_step, gpu, peers
from fastserve_kernels.bench.calls import on_each
from fastserve_kernels.bench.graphs import Graph
from fastserve_kernels.bench.plot import roofline
from fastserve_kernels.bench.report import Ceilings, Report, Row, row, summary
from fastserve_kernels.bench.shapes import MODELS, ROWS, Model, cases, group_size_for
from fastserve_kernels.bench.statistics import Samples, geometric_mean
from fastserve_kernels.commands import bench, tune
from fastserve_kernels.formats import Dense
from fastserve_kernels.gpu.compilation import Compiler
from fastserve_kernels.gpu.operator import Cost
from fastserve_kernels.gpu.registry import operators

MACHINE = Ceilings(bytes_per_second=4e12, flops_per_second=8e14)
ALL = bench.Arguments("operators", "cpu", [], [], [], False, False, None, None, 3600.0)


def test_samples() -> None:
    ours = Samples((2.0, 1.0, 4.0, 2.0, 2.0))
    theirs = Samples((6.0, 2.0, 12.0, 6.0, 5.0))
    assert ours.median == 2
    assert ours.spread == pytest.approx(0.75)
    assert ours.times_faster_than(theirs) == 3  # of 3, 2, 3, 3, 2.5
    assert geometric_mean([1, 4, 2]) == pytest.approx(2)
    with pytest.raises(ValueError, match="of no values"):
        geometric_mean([])


def one(part: str, m: int, ratios: Mapping[str, float]) -> Row:
    ours = Samples((1e-5,))
    others = {name: Samples((ratio * 1e-5,)) for name, ratio in ratios.items()}
    shape = {"m": m, "n": 4096, "k": 4096}
    return row("linear_int4", ("llama-3-8b", part), shape, Cost(10**7, 10**9), ours, others, MACHINE)


def test_row() -> None:
    measured = one("o", 1, {"cuBLAS bf16": 3.5})
    assert measured.microseconds == pytest.approx(10)
    assert measured.gigabytes_per_second == pytest.approx(1000)
    assert measured.of_bandwidth == pytest.approx(0.25)
    assert measured.teraflops == pytest.approx(100)
    assert measured.of_matmul == pytest.approx(0.125)
    assert measured.faster_than["cuBLAS bf16"] == pytest.approx(3.5)


def test_summary_is_the_geometric_mean_over_the_linears() -> None:
    rows = [
        one("qkv", 1, {"cuBLAS bf16": 2.0, "marlin": 1.0}),
        one("o", 1, {"cuBLAS bf16": 8.0}),
        one("o", 16, {"cuBLAS bf16": 3.0}),
    ]
    means = summary(rows)
    assert means["linear_int4", "llama-3-8b", 1] == {"cuBLAS bf16": pytest.approx(4)}
    assert means["linear_int4", "llama-3-8b", 16] == {"cuBLAS bf16": pytest.approx(3)}


def test_report_is_written_for_people_and_programs(tmp_path: Path) -> None:
    report = Report({"device": "NVIDIA H200"}, MACHINE, [one("o", 1, {"cuBLAS bf16": 3.25})])
    text, data = (path.read_text() for path in report.write(tmp_path / "deep" / "bench"))
    assert "device: NVIDIA H200" in text
    assert "bandwidth: 4000.0 GB/s" in text
    assert "| linear_int4 | llama-3-8b | 1 | 3.25 |" in text
    assert json.loads(data)["rows"][0]["faster_than"]["cuBLAS bf16"] == pytest.approx(3.25)


def test_report_grows_row_by_row_and_stops_when_the_time_is_spent(tmp_path: Path) -> None:
    seen: list[int] = []

    def rows() -> Iterator[Row]:
        for m in (1, 16, 32):
            if seen:
                written = json.loads((tmp_path / "bench.json").read_text())
                seen.append(len(written["rows"]))
            else:
                seen.append(0)
            yield one("o", m, {})

    def collect(seconds: float) -> Report:
        arguments = replace(ALL, out=tmp_path / "bench", budget_seconds=seconds)
        return bench.collect(rows(), Report({}, MACHINE, []), arguments)

    assert len(collect(60.0).rows) == 3
    assert seen == [0, 1, 2]
    stopped = collect(1e-9)
    assert len(stopped.rows) == 1
    assert "incomplete" in stopped.environment


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--plot needs matplotlib"):
        roofline(Report({}, MACHINE, [one("o", 1, {})]), tmp_path / "roofline.png")


def test_models_have_the_published_numbers_of_parameters() -> None:
    """Parameters of the linear layers: 8.03e9, 70.6e9 and 0.135e9 in all, less the embeddings and the
    norms."""
    counts = {
        name: model.layers * sum(n * k for n, k in model.linears.values()) for name, model in MODELS.items()
    }
    assert counts["llama-3-8b"] == 6_979_321_856
    assert counts["llama-3-70b/8"] * 8 == 68_451_041_280
    assert counts["smollm2"] == 106_168_320


def test_group_size_divides() -> None:
    assert [group_size_for("linear_int4", k) for k in (4096, 576, 96)] == [128, 64, 32]
    assert group_size_for("linear_nf4", 4096) == 64
    assert group_size_for("linear_int8", 4096) == 4096


def test_every_operator_has_cases() -> None:
    """The most important first, none twice, and with sizes that its own inputs take."""
    found = cases(operators(), ["llama-3-8b", "smollm2"], ROWS)
    assert {case.operator.name for case in found} == {operator.name for operator in operators()}
    assert [case.model for case in found] == sorted(case.model for case in found)
    labels = [(case.operator.name, case.label) for case in found]
    assert len(labels) == len(set(labels))
    int4 = [case.shape for case in found if case.operator.name == "linear_int4" and case.part == "down"]
    assert {(shape["n"], shape["k"]) for shape in int4} == {(4096, 14336), (576, 1536)}
    assert {shape["m"] for shape in int4} == set(ROWS)
    names = {case.name for case in found}
    assert "linear_int4" in names
    assert "paged_attention_decode cache_format=2" in names
    assert {"linear_block_sparse percent=50", "linear_block_sparse percent=20"} <= names
    for case in found:
        assert case.operator.candidates(case.shape), case.label
        assert case.operator.cost(case.shape, torch.bfloat16).bytes > 0


def test_peers_name_operators() -> None:
    assert set(peers.LINEAR) <= {operator.name for operator in operators()}
    assert next(iter(peers.peers_of("linear_bitmap"))) == peers.BASELINE
    assert "FlashInfer" in peers.peers_of("paged_attention_decode")
    with pytest.raises(ValueError, match="there is no file"):
        peers.load_vllm(Path("no-such-library.so"))


def test_contestants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = iter(range(10**6))
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: float(next(clock)))

    def contestant(name: str) -> list[Callable[[], object]]:
        return on_each(lambda copy: order.append(f"{name}{copy}"), range(3))

    times = cpu.measure({"a": contestant("a"), "b": contestant("b")}, repetitions=4)
    warm = ["a0", "a1", "a2", "b0", "b1", "b2"]
    turns = [(name, turn) for turn in range(4) for name in "ab"]
    untimed_and_timed = [f"{name}{(2 * turn + call) % 3}" for name, turn in turns for call in range(2)]
    assert order == [*warm, *untimed_and_timed]
    assert times["a"].seconds == (1.0,) * 4


def test_copies_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cache_bytes", lambda: 1000)
    assert cpu.count_for(2500) == 2
    assert cpu.count_for(100) * 100 > 2 * 1000
    assert cpu.cache_bytes() == 1000


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No measurement that means anything."""
    monkeypatch.setattr(cpu, "cache_bytes", lambda: 1000)
    monkeypatch.setattr(cpu, "SAMPLE_SECONDS", 1e-9)
    monkeypatch.setattr(cpu, "REPETITIONS", 2)
    monkeypatch.setattr(cpu, "LARGE", {"up": (256, 128)})
    monkeypatch.setattr(cpu, "ceilings", lambda: MACHINE)
    monkeypatch.setattr(cpu, "_much", lambda: torch.rand(100))


@pytest.mark.usefixtures("quick")
def test_every_format_is_measured_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "CPU_SHAPES", ("large",))
    arguments = replace(ALL, m=[1, 16], json=True, out=tmp_path / "cpu")
    assert bench.run(arguments) == 0
    rows: Sequence[dict[str, object]] = json.loads(capsys.readouterr().out)["rows"]
    linears = [line for line in rows if line["name"] != "paged_attention"]
    assert [line["name"] for line in linears] == [*cpu.FORMATS] * 2
    for line in linears:
        assert set(line["faster_than"]) == {"oneDNN bf16", "torch int8", "torch int4"}  # type: ignore[call-overload]
    assert set(rows[-1]["faster_than"]) == {"loop of SDPA", "loop of SDPA, gathered"}  # type: ignore[call-overload]


TINY = Model(hidden=256, intermediate=384, heads=4, kv_heads=2, head_dim=64, layers=2, vocabulary=512)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of graphs, calls, on two copies of little data: that they run is all that is seen."""

    def measure(graphs: Mapping[str, Graph], repetitions: int) -> dict[str, Samples]:
        for graph in graphs.values():
            assert len(graph.calls) <= 2
            graph.calls[-1]()
        return {name: Samples((1e-5, 2e-5)) for name in graphs}

    for module in (gpu, tune):
        monkeypatch.setattr(module, "copies_needed", lambda nbytes, device: 2)
        monkeypatch.setattr(module, "capture", lambda calls: Graph(None, calls))  # type: ignore[arg-type]
        monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(tune, "arch_of", lambda device: 90)
    monkeypatch.setattr(tune, "that_fit", lambda operator, candidates, *_: candidates[:2])
    monkeypatch.setitem(MODELS, "tiny", TINY)


@pytest.mark.usefixtures("pretended_gpu")
def test_kernels_are_measured_and_tuned(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["linear_sparse24_int4", "rms_norm"]
    wanted = cases(operators(names), ["tiny"], [1])
    wanted = [case for case in wanted if case.part in ("", "down")]
    failures: list[str] = []
    unknown = replace(wanted[0], shape={"m": 1})
    rows = list(gpu.measured([unknown, *wanted], device, MACHINE, failures))
    (failure,) = failures
    assert "KeyError" in failure
    assert [line.name for line in rows] == names
    assert "our linear_int4" in rows[0].faster_than
    if device.type == "cpu":  # where torch has no CUDA, and the report says so
        assert set(rows[0].missing) == {peers.BASELINE}
    assert capsys.readouterr().err.count(" us ") == 2
    with Compiler(1) as compiler:
        for case in wanted:
            outcome = tune.tune(case, device, compiler)
            assert not outcome.wrong
            assert outcome.entry is not None
            assert outcome.entry.config in case.operator.candidates(case.shape)
            assert outcome.entry.shape == case.shape
            assert "15.00 us" in outcome.line()


def test_decode_step() -> None:
    """int4 and its own dequantized weights choose the same token."""
    device = torch.device("cpu")
    torch.manual_seed(1)
    quantized = decode_step.Decoder(TINY, decode_step.random_int4, device, context=40)
    torch.manual_seed(1)
    dense = decode_step.Decoder(
        TINY,
        lambda n, k, device: Dense(decode_step.random_int4(n, k, device).dequantize().bfloat16()),
        device,
        context=40,
    )
    for decoder in (quantized, dense):
        decoder.token.fill_(7)
    assert int(quantized.step()) == int(dense.step()) != 7
    assert dense.cost().flops == quantized.cost().flops
    assert 3 < dense.cost().bytes / quantized.cost().bytes < 4
