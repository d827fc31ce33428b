"""The command line of `tritonserver`: addresses, and flags that are passed through."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from fastserve import cli
from fastserve.commands import serve
from fastserve.config import ConfigError
from fastserve.launcher.command_line import (
    SET_BY_FASTSERVE,
    Addresses,
    ServerOptions,
    check_server_flags,
    command_line,
)
from fastserve.launcher.installation import Installation
from fastserve.launcher.start_checks import OPENAI_PORT
from fastserve.start_error import StartError


def words(
    address: str = "127.0.0.1", *server_flags: str, metrics: str = "", with_keys: bool = False
) -> list[str]:
    options = ServerOptions(server_flags=server_flags)
    addresses = Addresses(address, address, metrics or address, options.ports.http)
    installation = Installation(Path("tritonserver"), {})
    return command_line(installation, options, addresses, [Path("models")], "prefix_", with_keys=with_keys)


@pytest.mark.parametrize(
    ("address", "http", "grpc"),
    [("0.0.0.0", "0.0.0.0", "0.0.0.0"), ("::1", "ipv6:::1", "[::1]"), ("::", "ipv6:::", "[::]")],
)
def test_each_service_has_its_own_form_of_an_address(address: str, http: str, grpc: str) -> None:
    line = words(address)
    assert f"--http-address={http}" in line
    assert f"--metrics-address={http}" in line
    assert f"--grpc-address={grpc}" in line


def test_every_flag_that_fastserve_sets_is_refused_by_name() -> None:
    own = {word.removeprefix("--").partition("=")[0] for word in words()[1:]} - {"backend-config"}
    assert own <= set(SET_BY_FASTSERVE)
    for name in SET_BY_FASTSERVE:
        for word in (f"--{name}", f"--{name}=1"):
            with pytest.raises(StartError, match=f"--{name} of tritonserver is set by FastServe"):
                check_server_flags(["--log-info=true", word])


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--http-port=1", "use --http-port before the `--`"),
        ("--grpc-addr=::1", "--grpc-address of tritonserver .*: use --host before the `--`"),
        ("--backend-config=python,shm-default-byte-size=1", "python,shm-.* is set by FastServe"),
        ("echo", "got 'echo': flags of tritonserver"),
    ],
)
def test_the_sentence_says_what_to_use_instead(flag: str, sentence: str) -> None:
    with pytest.raises(StartError, match=sentence):
        check_server_flags([flag])


def test_other_flags_come_last() -> None:
    flags = ("--trace-config", "level=TIMESTAMPS", "--log-info=false", "--backend-config=onnxruntime,x=1")
    check_server_flags(flags)
    assert words("127.0.0.1", *flags)[-4:] == list(flags)


def test_what_follows_two_dashes_goes_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[ServerOptions] = []

    def run(arguments: object) -> int:
        options.append(serve._options(arguments))  # type: ignore[arg-type]
        return 0

    monkeypatch.setattr(serve, "run", run)
    assert cli.main(["serve", "--http-port", "9000", "--", "--trace-config", "rate=1", "--log-info=0"]) == 0
    assert cli.main(["serve", "--http-port", "9000"]) == 0
    assert [each.server_flags for each in options] == [("--trace-config", "rate=1", "--log-info=0"), ()]
    assert options[0].ports.http == 9000


def test_openai_s_api_is_off_where_it_cannot_be_had() -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    assert serve._openai_port(parser.parse_args([])) == OPENAI_PORT
    assert serve._openai_port(parser.parse_args(["--openai-port", "0"])) == 0
    flags = ["--tls-cert", "cert.pem"]
    assert serve._openai_port(parser.parse_args(flags)) == 0
    with pytest.raises(ConfigError, match="openai_port: got 9001; allowed: 0 with --tls-cert"):
        serve._openai_port(parser.parse_args(["--openai-port", "9001", *flags]))


def test_the_help_shows_where_they_go(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    assert re.search(r"\[-- FLAG", capsys.readouterr().out)


def test_with_keys_the_headers_reach_the_models_and_all_other_apis_are_closed() -> None:
    line = words(with_keys=True)
    patterns = [word.partition("=")[2] for word in line if "header-forward-pattern" in word]
    assert len(patterns) == 2
    for pattern in patterns:
        assert [
            name for name in ("Authorization", "authorization", "x-authorization") if re.search(pattern, name)
        ] == [
            "Authorization",
            "authorization",
        ]
    closed = [word.partition("=")[2] for word in line if word.startswith(("--http-restr", "--grpc-restr"))]
    assert len(closed) == 2
    for value in closed:
        names, _, secret = value.partition(":")
        assert "model-repository" in names.split(",")
        assert not {"health", "inference"} & set(names.split(","))
        assert " " in secret.partition("=")[0]
        assert "\n" in secret.partition("=")[2]
    assert not [word for word in words() if "restricted" in word or "header" in word]
    assert closed[0] not in words(with_keys=True)


@pytest.mark.parametrize(
    "flag", ["--http-restricted-api=health:a=b", "--allow-vertex-ai=true", "--grpc-head=x"]
)
def test_with_keys_nobody_opens_another_door(flag: str) -> None:
    check_server_flags([flag])
    with pytest.raises(StartError, match="allowed without --keys-file only"):
        check_server_flags([flag], with_keys=True)


def test_the_metrics_port_may_have_an_address_of_its_own() -> None:
    line = words("192.0.2.7", metrics="127.0.0.1")
    assert "--metrics-address=127.0.0.1" in line
    assert "--http-address=192.0.2.7" in line
