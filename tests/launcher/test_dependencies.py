"""What is imported is declared, and why, by the distribution that imports it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # Python 3.11

PROJECT = Path(__file__).parents[2]
OWN = {"fastserve", "fastserve_client", "fastserve_kernels", "tests"}
FROM_TRITON_SERVER = {"triton_python_backend_utils"}
BEFORE_INSTALLATION = {
    "matplotlib": "matplotlib",
    "lm_eval": "lm-eval",
    "openvino": "openvino",
    "openvino_genai": "openvino-genai",
    "mistralrs": "mistralrs",
}
"""Distributions of extras that the tests do without."""


def is_for_type_checkers(node: ast.AST) -> bool:
    """Whether it is `if TYPE_CHECKING:`; what that imports need not be installed."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of what runs."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not is_for_type_checkers(child):
            yield from statements(child)


def imported(folders: list[Path]) -> dict[str, Path]:
    """Top-level packages of others, with a file that imports each."""
    found: dict[str, Path] = {}
    for file in (path for folder in folders for path in sorted(folder.rglob("*.py"))):
        for node in statements(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            found.update({name.split(".")[0]: file for name in names})
    local = {path.stem for folder in folders for path in folder.rglob("*.py")}
    others = found.keys() - sys.stdlib_module_names - OWN - FROM_TRITON_SERVER - local
    return {name: found[name] for name in others}


def normalized(requirement: str) -> str:
    """The name of a distribution, as PyPI compares names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", requirement)[0]).lower()


def declared(pyproject: Path) -> set[str]:
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project.get("optional-dependencies", {}).values()
    return {normalized(each) for each in [*project["dependencies"], *(r for extra in extras for r in extra)]}


@pytest.mark.parametrize(
    ("pyproject", "folders"),
    [
        ("pyproject.toml", ["backend", "kernels", "client", "model_repository"]),
        ("pyproject.toml", ["tests", "examples", "load_tests"]),
        ("client/pyproject.toml", ["client"]),
    ],
    ids=["fastserve", "what uses it", "fastserve-client"],
)
def test_every_import_is_declared(pyproject: str, folders: list[str]) -> None:
    distributions = packages_distributions()
    missing = {
        name: str(file.relative_to(PROJECT))
        for name, file in imported([PROJECT / folder for folder in folders]).items()
        if declared(PROJECT / pyproject).isdisjoint(
            normalized(each) for each in distributions.get(name, [BEFORE_INSTALLATION.get(name, name)])
        )
    }
    assert missing == {}


@pytest.mark.parametrize("pyproject", ["pyproject.toml", "client/pyproject.toml"])
def test_every_dependency_has_its_reason_beside_it(pyproject: str) -> None:
    lines = re.findall(r'^  "(.+?)",(.*)$', (PROJECT / pyproject).read_text(), re.MULTILINE)
    named = {normalized(requirement) for requirement, _ in lines}
    assert declared(PROJECT / pyproject) <= named
    dependencies = [(each, rest) for each, rest in lines if normalized(each) in declared(PROJECT / pyproject)]
    assert [each for each, rest in dependencies if not re.fullmatch(r"\s*# \S.+", rest)] == []
