"""Torch is left out of a process that only handles text."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def run_python(*lines: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )


def test_torch_is_kept_out_silently(save_tokenizer: Callable[..., Path]) -> None:
    directory = save_tokenizer()
    done = run_python(
        "import sys",
        "from fastserve.text.tokenizer import Tokenizer",
        "from fastserve.text.torch_exclusion import keep_torch_out",
        "from fastserve.text import input_processor, output_processor",
        "assert 'torch' not in sys.modules",
        "keep_torch_out()",
        f"print(Tokenizer({str(directory)!r}).decode([0]), sys.modules['torch'])",
    )
    assert done.stdout.split() == ["!", "None"]
    assert done.stderr == ""


def test_torch_that_is_loaded_already_stays() -> None:
    code = ["import sys, types", "sys.modules['torch'] = loaded = types.ModuleType('torch')"]
    code += ["from fastserve.text.torch_exclusion import keep_torch_out", "keep_torch_out()"]
    run_python(*code, "assert sys.modules['torch'] is loaded")
