"""The command `fastserve`."""

from __future__ import annotations

import types

import pytest

from fastserve import cli
from fastserve.config import ConfigError
from fastserve.start_error import StartError


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([name, "--help"])
    assert left.value.code == 0
    assert f"fastserve {name}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["nonsense"], ["serve", "--nonsense"]])
def test_what_is_no_command_line_ends_with_status_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == 2


@pytest.mark.parametrize("error", [StartError("why not: do this"), ConfigError("why not: do this")])
def test_an_expected_error_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: object) -> int:
        raise error

    module = types.SimpleNamespace(add_arguments=lambda parser: None, run=run, ERRORS=())
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    assert cli.main(["serve"]) == 1
    assert capsys.readouterr().err == "fastserve: why not: do this\n"
