"""What the Dockerfile and the CI file name exists here: no image can be built in the tests."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import yaml

from fastserve import cli
from fastserve.commands.serve import OPENAI_PORT
from fastserve.launcher.installation import GLIBC_NEEDED
from fastserve.launcher.start_checks import Ports

PROJECT = Path(__file__).parents[2]
DEBIAN_GLIBC = {"bullseye": (2, 31), "bookworm": (2, 36), "trixie": (2, 41)}


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """Name and rest of each, lines joined."""
    lines = (PROJECT / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line and line[0] != "#"]


def of(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [rest for each, rest in instructions if each == name]


def test_its_python_programs_import_what_there_is(instructions: list[tuple[str, str]]) -> None:
    """When a module is moved, this fails and not the build."""
    imports = re.findall(r"from (fastserve\S+) import (\w+); \2\(", " ".join(of(instructions, "RUN")))
    assert len(imports) == 2
    for module, function in imports:
        assert callable(getattr(importlib.import_module(module), function))


def test_it_copies_what_is_there_and_not_ignored(instructions: list[tuple[str, str]]) -> None:
    sources = [name for rest in of(instructions, "COPY") for name in rest.split()[:-1]]
    kept = {line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    assert kept == set(sources)
    assert all((PROJECT / source).exists() for source in sources)


def test_its_system_can_run_the_embedded_server(instructions: list[tuple[str, str]]) -> None:
    (image,) = of(instructions, "FROM")
    assert DEBIAN_GLIBC[image.rpartition("-")[2]] >= GLIBC_NEEDED


def test_its_ports_user_and_command(instructions: list[tuple[str, str]]) -> None:
    ports = Ports()
    assert of(instructions, "EXPOSE") == [f"{ports.http} {ports.grpc} {ports.metrics} {OPENAI_PORT}"]
    (health,) = of(instructions, "HEALTHCHECK")
    assert f"http://127.0.0.1:{ports.http}/v2/health/ready" in health
    assert of(instructions, "USER") == ["1000"]
    program, command, *_ = json.loads(of(instructions, "ENTRYPOINT")[0])
    assert program == "fastserve"
    assert command in cli.COMMANDS


def test_a_public_forge_runs_the_script_of_ci() -> None:
    text = (PROJECT / ".github" / "workflows" / "ci.yml").read_text()
    (job,) = yaml.safe_load(text)["jobs"].values()
    assert {"run": ".ci/run"} in job["steps"]
    for pattern in re.findall(r"hashFiles\('(.+?)'\)", text):
        assert list(PROJECT.glob(pattern))
