"""The command `fastserve-kernels`: compile, tune, bench, session."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")
Subparsers = argparse._SubParsersAction  # argparse has no public name for it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status. What is asked wrongly is said on stderr, with status 2."""
    arguments = argument_parser().parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # these commands are about machine code
    try:
        return int(arguments.run(arguments))
    except ValueError as error:
        print(f"fastserve-kernels {arguments.command}: {error}", file=sys.stderr)
        return 2


def argument_parser() -> argparse.ArgumentParser:
    """The parser of `fastserve-kernels`; each command sets `run`."""
    parser = argparse.ArgumentParser(
        prog="fastserve-kernels", description="The Triton kernels: compiled ahead, tuned, measured."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_compile(commands)
    _add_tune(commands)
    _add_bench(commands)
    _add_session(commands)
    return parser


def _above_zero(kind: Callable[[str], float]) -> Callable[[str], float]:
    """A number of that kind, above 0."""

    def convert(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} must be above 0")
        return value

    convert.__name__ = "whole number" if kind is int else "number"
    return convert


_COUNT = _above_zero(int)
_SECONDS = _above_zero(float)


def _names(text: str) -> list[str]:
    return text.split(",")


def _rows(text: str) -> list[int]:
    return [int(_COUNT(word)) for word in text.split(",")]


def _of_compiling() -> argparse.ArgumentParser:
    """What the commands take that compile kernels."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--operator", type=_names, default=[], help="A,B; all if none is named")
    parser.add_argument("--jobs", type=_COUNT, default=os.cpu_count() or 1, help="processes that compile")
    return parser


def _add_compile(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "compile",
        parents=[_of_compiling()],
        help="compile every kernel, without a GPU; a table of registers, spills and shared memory",
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=(80, 90, 100), default=[80, 90, 100])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="of the activations")
    parser.add_argument("--thorough", action="store_true", help="float16 and float32 for every shape too")
    parser.add_argument("--out", type=Path, nargs="+", default=[], help="report.md, report.json")
    parser.set_defaults(run=_compile)


def _compile(given: argparse.Namespace) -> int:
    from fastserve_kernels.commands import compile

    return compile.run(
        compile.Arguments(given.arch, given.dtype, given.operator, given.thorough, given.out, given.jobs)
    )


def _add_tune(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "tune", parents=[_of_compiling()], help="find the best config of each shape on this machine's GPU"
    )
    parser.add_argument(
        "--shapes", type=_names, default=["llama-3-8b", "llama-3-70b/8", "smollm2"], help="MODEL,MODEL"
    )
    parser.add_argument(
        "--m", type=_rows, default=[1, 16, 32, 64, 256, 2048, 4, 8, 2], help="tokens of a step: 1,16"
    )
    parser.add_argument("--missing", action="store_true", help="only shapes that are not tuned yet")
    parser.add_argument("--budget-seconds", type=_SECONDS, default=480.0)
    parser.set_defaults(run=_tune)


def _tune(given: argparse.Namespace) -> int:
    from fastserve_kernels.commands import tune

    return tune.run(
        tune.Arguments(given.operator, given.shapes, given.m, given.missing, given.budget_seconds, given.jobs)
    )


def _add_bench(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("bench", help="measure the operators on this machine's device")
    parser.add_argument(
        "what", nargs="?", choices=("operators", "decode-step", "all-reduce"), default="operators"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="", help="a GPU if there is one")
    parser.add_argument(
        "--operator", type=_names, default=[], help="A,B; on a CPU formats; all if none is named"
    )
    parser.add_argument(
        "--shapes", type=_names, default=[], help="llama-3-8b,llama-3-70b/8,smollm2; CPU: large"
    )
    parser.add_argument("--m", type=_rows, default=[], help="tokens of a step: 1,16,64")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.add_argument("--plot", action="store_true", help="draw a roofline too, to the file of --out")
    parser.add_argument("--out", type=Path, help="write STEM.md and STEM.json after each row")
    parser.add_argument(
        "--vllm-library", type=Path, help="vllm/_C.abi3.so of a vLLM wheel: Marlin and Machete"
    )
    parser.add_argument("--budget-seconds", type=_SECONDS, default=3600.0)
    parser.set_defaults(run=_bench)


def _bench(given: argparse.Namespace) -> int:
    from fastserve_kernels.commands import bench

    return bench.run(
        bench.Arguments(
            given.what,
            given.device,
            given.operator,
            given.shapes,
            given.m,
            given.json,
            given.plot,
            given.out,
            given.vllm_library,
            given.budget_seconds,
        )
    )


def _add_session(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("session", help="test, tune and measure on a GPU, within a time")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--seconds", type=_SECONDS, default=540.0)
    parser.add_argument("--vllm-library", type=Path)
    parser.set_defaults(run=_session)


def _session(given: argparse.Namespace) -> int:
    from fastserve_kernels.commands import session

    return session.run(session.Arguments(given.out.absolute(), given.seconds, given.vllm_library))
