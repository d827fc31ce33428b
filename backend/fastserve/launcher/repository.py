"""Where the model repository lies."""

from __future__ import annotations

import compileall
from pathlib import Path

import fastserve
from fastserve.start_error import StartError


def model_repository() -> Path:
    """FastServe's model repository: inside the installed package, or at the root of a checkout.

    Raises StartError when there is none.
    """
    package = Path(fastserve.__file__).resolve().parent
    for directory in (package / "model_repository", package.parents[1] / "model_repository"):
        if directory.is_dir():
            return directory
    raise StartError(f"no model_repository in {package} nor in {package.parents[1]}: give --model-repository")


def model_names(repository: Path) -> list[str]:
    """The models in a repository. Raises StartError when there is none."""
    names = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    if not names:
        raise StartError(f"no model in {repository}: give --model-repository a directory of models")
    return names


def compile_models(repository: Path) -> None:
    """Compiles the models' Python files, which else their first import would do.

    That writes into the repository, and the server takes a model whose folder has changed for a new one: it
    would load `engine` a second time when `readiness` is loaded anew.
    """
    # Where it cannot be written there is no harm: the import cannot either.
    compileall.compile_dir(repository, maxlevels=4, quiet=2)
