"""The command `fastserve-kernels`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastserve_kernels import cli
from fastserve_kernels.commands import session
from fastserve_kernels.commands.session import Arguments


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # to be restored: a command takes it away


@pytest.mark.parametrize("command", ["tune", "session", "bench decode-step", "bench --device cuda"])
def test_commands_that_need_a_gpu(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastserve_kernels.bench.cpu.ceilings", lambda: pytest.fail("measured"))
    assert cli.main(command.split()) == 2
    assert "needs a GPU, and torch sees none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("compile --operator linear_int5", "operator 'linear_int5': there is none of this name; there are"),
        ("bench --operator int5 --device cpu", "operator 'int5': none of this name on a CPU; there are int4"),
        ("bench --shapes gpt-2 --device cpu", "shapes 'gpt-2': no such model; there are llama-3-8b"),
        ("bench --plot", "--plot needs --out"),
        ("bench --device cpu --vllm-library x.so", "--vllm-library"),
    ],
)
def test_wrong_values(command: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command.split()) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("", "required: command"),
        ("compile --arch 70", "invalid choice: 70"),
        ("bench --m 0", "0 must be above 0"),
        ("bench --m 1,x", "invalid"),
        ("tune --budget-seconds -1", "-1 must be above 0"),
        ("bench --fast", "unrecognized arguments: --fast"),
    ],
)
def test_wrong_usage(command: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(command.split())
    assert raised.value.code == 2
    assert complaint in capsys.readouterr().err


def test_session_fits_its_time(tmp_path: Path) -> None:
    steps = session.steps(Arguments(tmp_path, 500.0, None))
    assert [step.name for step in steps] == ["tests", "tune-int4", "tune", "decode-step", "bench"]
    assert sum(step.share for step in steps) <= 1
    for step in steps[1:]:
        (command,) = step.commands
        arguments = list(command[command.index("fastserve_kernels") + 1 :])
        assert cli.argument_parser().parse_args(arguments).command in ("tune", "bench")


def test_session_tests_every_kernel() -> None:
    commands = [command[-1] for command in session.steps(Arguments(Path(), 500.0, None))[0].commands]
    assert any(command.endswith("test_attention.py") for command in commands)
    assert not any(command.endswith("test_cli.py") for command in commands)


def test_session_goes_on_after_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = Arguments(tmp_path, 10.0, None)
    assert not session.passes(session.Step("tests", [["false"], ["true"], ["false"]], 0.1), arguments)
    assert session.passes(session.Step("bench", [["env"]], 0.1), arguments)
    log = (tmp_path / session.LOG).read_text()
    assert "$ false\nfailed with status 1\n" in log
    assert "$ true\npassed\n" in log
    assert "TRITON_INTERPRET=0" in log
    assert f"PYTHONPATH={session.REPOSITORY / 'kernels'}" in log
    assert "tests: 2 failed with status 1" in capsys.readouterr().out


def test_session_ends_a_step_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "GRACE_SECONDS", 0.1)
    step = session.Step("tune", [["sh", "-c", "echo begun; exec sleep 60"]], 0.1)
    assert not session.passes(step, Arguments(tmp_path, 1.0, None))
    assert "begun\nout of time" in (tmp_path / session.LOG).read_text()
