"""`fastserve simulate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastserve.cli import main

SMALL = ["simulate", "--requests", "120", "--prompt-tokens", "30,1,1,64", "--output-tokens", "20,1,1,64"]


def test_a_table_the_figures_and_the_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["--loads", "0.5,1.2", "--priorities", "5:0.2,0:0.8", "--max-num-seqs", "4"]
    arguments += ["--policies", "fcfs,mlfq,srpt", "--json", str(figures), "--out", str(tmp_path / "plots")]
    assert main([*SMALL, *arguments]) == 0
    printed = capsys.readouterr().out
    assert "load 1.2" in printed
    assert "priority 5" in printed
    report = json.loads(figures.read_text())
    runs = {(run["policy"], run["load"]): run for run in report["runs"]}
    assert set(runs) == {(policy, load) for policy in ("fcfs", "mlfq", "srpt") for load in (0.5, 1.2)}
    for (policy, load), run in runs.items():
        assert run["rate"] == pytest.approx(load * report["capacity"][0])
        assert [row["priority"] for row in run["classes"]] == [5, 0, None], policy
    assert (
        runs["srpt", 1.2]["classes"][-1]["normalized_latency_mean"]
        < (runs["fcfs", 1.2]["classes"][-1]["normalized_latency_mean"])
    )
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    per_load = {f"{name}_{load}.png" for name in ("ttft", "completion", "queue") for load in ("0.5", "1.2")}
    assert names == {"goodput.png", *per_load}


def test_a_trace_runs_at_its_own_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:17:{second:02d}.5,{40 + second},{5 + second}" for second in range(40)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    assert main(["simulate", "--trace", str(trace), "--policies", "fcfs", "--json", str(tmp_path / "f")]) == 0
    [run] = json.loads((tmp_path / "f").read_text())["runs"]
    assert run["seconds"] == pytest.approx(39, abs=3)
    assert "(1 a second), all requests" in capsys.readouterr().out


def test_a_policy_of_ones_own(tmp_path: Path) -> None:
    policy = tmp_path / "own.py"
    policy.write_text(
        "from fastserve.scheduling.policies.policy import Policy\n"
        "class Latest(Policy):\n"
        "    def __init__(self, config): pass\n"
        "    def rank(self, view, now): return (-view.arrival,)\n"
    )
    assert main([*SMALL, "--policies", f"{policy}:Latest"]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--policies", "fcfs,lifo"], "policy: got 'lifo'"),
        (["--policies", "fcfs,fcfs"], "--policies: got 'fcfs,fcfs'"),
        (["--loads", "1.0,0"], "--loads: got '1.0,0'; allowed: numbers above 0"),
        (["--replicas", "0"], "--replicas: got 0: Expected `int` >= 1"),
        (["--message-delay-ms", "-1"], "--message-delay-ms: got -1.0; allowed: 0 or more"),
        (["--kv-blocks", "3"], "a request of"),
        (["--step-times", "nowhere.json"], "nowhere.json"),
    ],
)
def test_what_cannot_be_is_named(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *arguments]) == 1
    assert sentence in capsys.readouterr().err
