"""What the documents name is there, and what they promise of the code holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "client/README.md",
    "docs/architecture.md",
    "docs/access.md",
    "docs/api.md",
    "docs/openai.md",
    "docs/operations.md",
    "docs/migrating.md",
    "findings/README.md",
    "docs/architecture.md",
    "docs/log.md",
    "docs/newcomer.md",
    "docs/performance.md",
]
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:md|toml|py))`")
"""A file or folder in code quotes."""
ROOTS = (".", "docs", "backend", "backend/fastserve", "kernels", "kernels/fastserve_kernels", "client")
MADE = {".venv/bin", "logs/", "load_tests/report.html", "build/", "dist/"}
"""Those that a command leaves."""
REPEATED = {"model.py"}
"""One in each model of the repository."""
FUNCTION = re.compile(r"`([\w/-]+\.py)`: `([\w.]+)`")
"""A function or class of a file in code quotes."""


def sources() -> list[Path]:
    return [path for folder in ("backend", "kernels", "client") for path in (PROJECT / folder).rglob("*.py")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_are_there(document: str) -> None:
    text = (PROJECT / document).read_text()
    roots = [(PROJECT / document).parent, *(PROJECT / root for root in ROOTS)]
    names = set(PATH.findall(text)) - MADE - REPEATED
    assert [name for name in sorted(names) if not any((root / name).exists() for root in roots)] == []


@pytest.mark.parametrize("document", ["docs/architecture.md", "docs/newcomer.md"])
def test_the_names_in_a_row_are_in_its_file(document: str) -> None:
    """A row of a table that begins with a Python file names classes and functions of that file."""
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (.*) \|$", (PROJECT / document).read_text(), re.MULTILINE)
    assert len(rows) >= 20
    missing = []
    for path, text in rows:
        [source, *_] = [PROJECT / root / path for root in ROOTS if (PROJECT / root / path).exists()]
        words = set(re.findall(r"\w+", source.read_text()))
        names = {name for each in re.findall(r"`([A-Za-z_][\w.]*)`", text) for name in each.split(".")}
        missing += [(path, name) for name in sorted(names - words)]
    assert missing == []


def test_functions_of_the_architecture_are_in_their_files() -> None:
    named = FUNCTION.findall((PROJECT / "docs/architecture.md").read_text())
    assert len(named) > 10
    for path, name in named:
        text = (PROJECT / "backend/fastserve" / path).read_text()
        for part in name.split("."):
            assert re.search(rf"(?:def|class) {part}\b", text), (path, name)


def test_messages_of_the_architecture_are_those_of_types() -> None:
    text = (PROJECT / "docs/architecture.md").read_text()
    section = text[text.index("## The messages") : text.index("## What is known of")]
    names = ("types.py", "ensemble/control_messages.py", "scheduling/capacity.py")
    files = [PROJECT / "backend/fastserve" / name for name in names]
    types = "".join(path.read_text() for path in files)
    for name in re.findall(r"`([A-Z]\w+)`", section):
        assert re.search(rf"class {name}\(", types), name


def test_the_main_path_is_listed_once_and_is_short() -> None:
    text = (PROJECT / "docs/architecture.md").read_text()
    section = text[text.index("## The main path") : text.index("Beside it:")]
    files = re.findall(r"`([\w/-]+\.py)`", section)
    assert len(set(files)) == len(files)
    for name in files:
        lines = (PROJECT / "backend/fastserve" / name).read_text().splitlines()
        assert len(lines) <= 400, name


def test_nothing_is_unpickled_and_no_code_of_a_model_is_run() -> None:
    for path in sources():
        text = path.read_text()
        assert not re.search(r"trust_remote_code=(?!False)|\bimport (?:pickle|dill|joblib)\b", text), path
        for call in re.findall(r"torch\.load\(.*?\)\)?", text):
            assert "weights_only=True" in call, path


def test_findings_have_their_form() -> None:
    findings = sorted((PROJECT / "findings").glob("*.sh"))
    assert findings
    for path in findings:
        text = path.read_text()
        assert text.startswith("#!/bin/sh\n# "), path
        assert len(text.splitlines()) <= 60, path
        assert "set -eu\nwork=$(mktemp -d)\ntrap 'rm -rf \"$work\"' EXIT\n" in text, path
        assert not re.search(r"\bfastserve\w* (?:import|==)|import fastserve", text), path
        installed = re.findall(r"^.*pip.* install .*", text.replace("\\\n", ""), re.MULTILINE)
        assert installed, path
        assert all("==" in line for line in installed), path
