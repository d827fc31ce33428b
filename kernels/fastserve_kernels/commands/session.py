"""`fastserve-kernels session`: everything that waits for a GPU, in one command and within a time."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastserve_kernels.gpu.device import the_gpu
from fastserve_kernels.gpu.tuning import DIRECTORY, file_name

REPOSITORY = Path(__file__).parents[3]
GRACE_SECONDS = 20
"""A step stops by itself within its share, and is ended this much later."""
LOG = "gpu-session.txt"
TESTS_OF_COMMANDS = ("test_bench", "test_cli", "test_compile", "test_tuning")


@dataclass(frozen=True)
class Arguments:
    """The arguments of `fastserve-kernels session`."""

    out: Path
    seconds: float
    vllm_library: Path | None


@dataclass(frozen=True)
class Step:
    """Commands that run side by side, and the share of the whole time that they may take."""

    name: str
    commands: Sequence[Sequence[str]]
    share: float


def run(arguments: Arguments) -> int:
    """Tests, tunes, and measures; what the steps print is in out/gpu-session.txt. Returns 1 if one failed.

    Raises ValueError without a GPU.
    """
    the_gpu()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / LOG).write_text("")
    failed = [step.name for step in steps(arguments) if not passes(step, arguments)]
    tuned = DIRECTORY / file_name(torch.cuda.get_device_name())
    if tuned.exists():
        shutil.copy(tuned, arguments.out / tuned.name)
    print(f"failed: {', '.join(failed)}" if failed else "all steps passed")
    return 1 if failed else 0


def steps(arguments: Arguments) -> list[Step]:
    """In the order of what the others rely on: a wrong kernel is not worth tuning."""
    kernels = [sys.executable, "-m", "fastserve_kernels"]
    bench = [*kernels, "bench", "--device", "cuda"]
    peers = ["--vllm-library", str(arguments.vllm_library)] if arguments.vllm_library else []

    def budget(share: float) -> list[str]:
        return ["--budget-seconds", str(arguments.seconds * share)]

    def out(name: str) -> list[str]:
        return ["--out", str(arguments.out / name)]

    rows = ["--m", "1,16,32,64,256,2048,2,4,8"]
    tune = [*kernels, "tune", "--missing"]
    int4 = ["--operator", "linear_int4", "--shapes", "llama-3-8b", "--m", "1,16,32,64"]
    return [
        Step("tests", [_pytest(path) for path in kernel_tests()], 0.22),
        Step("tune-int4", [[*tune, *int4, *budget(0.06)]], 0.06),
        Step("tune", [[*tune, *budget(0.3)]], 0.3),
        Step("decode-step", [[*bench, "decode-step", *out("gpu-decode-step")]], 0.1),
        Step("bench", [[*bench, *rows, *budget(0.24), *peers, *out("gpu-bench")]], 0.24),
    ]


def kernel_tests() -> list[Path]:
    """The files of tests that launch kernels: those of the commands need no GPU."""
    return [
        path
        for path in sorted((REPOSITORY / "tests" / "kernels" / "gpu").glob("test_*.py"))
        if path.stem not in TESTS_OF_COMMANDS
    ]


def _pytest(path: Path) -> list[str]:
    """Without the repository's own conftest.py, which needs the engine, and has kernels interpreted."""
    options = ["--confcutdir=tests/kernels", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *options, str(path)]


def passes(step: Step, arguments: Arguments) -> bool:
    """Runs a step for no longer than its share; what its commands print is added to the log."""
    end = time.monotonic() + arguments.seconds * step.share + GRACE_SECONDS
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in step.commands]
        running = [
            subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                env=_environment(),
                start_new_session=True,
            )
            for command, output in zip(step.commands, outputs, strict=True)
        ]
        outcomes = [_outcome(process, end) for process in running]
        with (arguments.out / LOG).open("a") as log:
            for command, output, outcome in zip(step.commands, outputs, outcomes, strict=True):
                output.seek(0)
                log.write(f"$ {shlex.join(command)}\n{output.read()}{outcome}\n\n")
    for outcome in sorted(set(outcomes)):
        print(
            f"{step.name}: {outcomes.count(outcome)} {outcome} in {time.monotonic() - start:.0f} s",
            flush=True,
        )
    return set(outcomes) == {"passed"}


def _outcome(process: subprocess.Popen[bytes], end: float) -> str:
    """Waits for it, and ends it and what it started when the time is over."""
    try:
        code = process.wait(max(end - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "out of time"
    return f"failed with status {code}" if code else "passed"


def _environment() -> dict[str, str]:
    """Kernels are compiled, and imported from here, installed or not."""
    paths = (str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
