"""Paths of ASCII characters for a clone, a cache or a model that lies under another one.

The Python in a stub of Triton server 2.51 takes paths for ASCII, whatever the locale and PYTHONUTF8 say: it
cannot start from an environment that lies elsewhere, nor open a model there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from fastserve.launcher.run_directory import RunDirectory


def ascii_path(run: RunDirectory, name: str, path: str) -> str:
    """The path itself where it is of ASCII characters or does not exist, else a link to it of this name."""
    if path.isascii() or not os.path.isabs(path) or not os.path.exists(path):
        return path
    # Some files are known by their endings.
    suffix = Path(path).suffix
    return str(run.link(f"{name}{suffix if suffix.isascii() else ''}", Path(path)))


def ascii_environment(run: RunDirectory, variables: Mapping[str, str]) -> dict[str, str]:
    """The variables, with those that hold one path made ASCII: HOME, TMPDIR, XDG_CACHE_HOME and the like."""
    return {name: ascii_path(run, f"variables/{name}", value) for name, value in variables.items()}


def python_prefix(run: RunDirectory) -> Path | None:
    """The prefix of a Python environment that can import this process's modules; None: there is none.

    It is this process's own where that has an ASCII path, else one made of links.
    """
    modules = [entry for entry in sys.path if entry and os.path.isdir(entry)]
    if all(path.isascii() for path in (sys.prefix, sys.base_prefix, *modules)):
        return Path(sys.prefix) if sys.prefix != sys.base_prefix else None
    base = Path(ascii_path(run, "base", sys.base_prefix))
    prefix = run.path / "environment"
    run.link("environment/bin/python3", base / "bin" / Path(sys.executable).resolve().name)
    (prefix / "pyvenv.cfg").write_text(f"home = {base / 'bin'}\n")
    packages = prefix / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    links = [ascii_path(run, f"modules/{number}", entry) for number, entry in enumerate(modules)]
    # Only what this process added to the standard library, which the environment has of its own.
    own = [link for link, entry in zip(links, modules, strict=True) if not _is_standard(entry)]
    (packages / "fastserve.pth").write_text("\n".join(own) + "\n")
    return prefix


def _is_standard(entry: str) -> bool:
    standard = os.path.dirname(os.__file__)
    return entry in (standard, os.path.join(standard, "lib-dynload"))
