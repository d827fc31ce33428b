"""What makes a kernel of a function, and runs it on the threads that torch already has.

torch's OpenMP threads spin for a while after each of its operators; threads of our own would have to fight
them for the cores. So a kernel is run by a team of these: `GOMP_parallel` is how compiled C calls GNU's
runtime, and Intel's and LLVM's offer it too.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
import struct
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from llvmlite import ir
from numba import cfunc, njit, types

from fastserve_kernels.cpu.kernels import elements, vnni
from fastserve_kernels.cpu.kernels.vectors import intrinsic

WorkCounter = Any
"""In a kernel: the atomic counter from which threads take work items."""
Elements = Any
"""In a kernel: a pointer to elements of the dtype that it is compiled for; callers give an address."""
Stored = Any
"""In a kernel: a pointer to elements of its second dtype, that of what is kept; callers give an address."""
Floats = Any
"""In a kernel: a pointer to float32; callers give an address."""
Integers = Any
"""In a kernel: a pointer to int64; callers give an address."""
Bytes = Any
"""In a kernel: a pointer to what has no type; callers give an address."""
RowWords = Any
"""In a kernel: a pointer to words of weights, pairs for bfloat16 and single ones for other dtypes."""
Quads = Any
Nibbles = Any
Codes = Any
"""In a kernel: pointers to these words of weights."""
Packed = Any
"""In a kernel: a pointer to the words of weights that it is compiled for, "Nibbles" or "Codes"."""

AS_MANY_THREADS_AS_TORCH = 0
"""The runtime's default, which `torch.set_num_threads` sets; another number would end or start threads."""

ELEMENTS = {
    torch.float32: elements.float32,
    torch.float16: elements.float16,
    torch.bfloat16: elements.bfloat16,
}
record_call: ContextVar[Callable[[int, Any], None] | None] = ContextVar("record_call", default=None)
"""Takes, while calls are recorded and not run, the address of each kernel and the array of its arguments, the
first of which is the counter of its work items, 0. Whether it is worth several threads is not recorded: all
threads of a program enter all calls."""

KERNEL_NAMES: dict[int, str] = {}
"""The function of each kernel that is loaded, by its address."""

STORED = {**ELEMENTS, torch.int8: elements.int8, torch.float8_e4m3fn: elements.float8}


class Kernel:
    """A compiled function. Call it with addresses and numbers in the order of the function's parameters,
    less the first, `counter`."""

    def __init__(
        self,
        function: Callable[..., None],
        dtype: torch.dtype,
        stored: torch.dtype | None = None,
        packed: str = "",
    ) -> None:
        if dtype not in ELEMENTS:
            raise ValueError(f"{function.__name__} takes {' or '.join(map(str, ELEMENTS))}, not {dtype}")
        named = [str(p.annotation) for p in inspect.signature(function).parameters.values()][1:]
        kinds = [packed if kind == "Packed" else kind for kind in named]
        self._arguments = struct.Struct("=q" + "".join("d" if kind == "float" else "q" for kind in kinds))
        self._buffer = ctypes.c_int64 * (len(kinds) + 1)
        name = function.__name__ + packed
        self._compiled = _compile(name, function, ELEMENTS[dtype], STORED[stored or dtype], ",".join(kinds))
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._compiled.address)
        KERNEL_NAMES[self._compiled.address] = name

    def __call__(self, in_parallel: bool, *arguments: float) -> None:
        """Runs on the calling thread, and in parallel on all that torch's operators run on."""
        buffer = self._buffer()
        self._arguments.pack_into(buffer, 0, 0, *arguments)
        record = record_call.get()
        if record is not None:
            record(self._compiled.address, buffer)
        elif in_parallel:
            run_in_parallel(self._run, buffer)
        else:
            self._run(buffer)


def kernel(function: Callable[..., None]) -> Callable[..., Kernel]:
    """Decorates a function that takes work items until none is left; gives its kernel for a dtype, and
    for a second one if it has parameters that are `Stored`, and for words if any are `Packed`.

    Its parameters are annotated with `WorkCounter`, the first, the names above, `int` and `float`. It is
    compiled when its dtypes are first asked for, once per machine: numba keeps what it compiles on disk."""
    return functools.cache(functools.partial(Kernel, function))


def _entry(arguments: Any) -> None:
    """Becomes the entry of each kernel, with globals of its own."""
    body(arguments, *unpack(arguments, element, stored, kinds))  # type: ignore[name-defined] # noqa: F821


def _compile(
    name: str, function: Callable[..., None], element: types.Type, stored: types.Type, kinds: str
) -> Any:
    # numba's cache goes by the entry's file and name, and finds no globals changed: all is in the name.
    entry = FunctionType(
        _entry.__code__,
        {
            "body": njit(function, error_model="numpy"),
            "unpack": unpack,
            "element": element,
            "stored": stored,
            "kinds": kinds,
        },
    )
    entry.__module__ = __name__
    return compile_entry(entry, f"{name}_{element}_{stored}")


def compile_entry(entry: FunctionType, name: str) -> Any:
    """A function of a pointer to int64, compiled for callers in C; numba keeps it by the name."""
    entry.__qualname__ = f"{name}_{_source_digest()}"
    return cfunc(types.void(types.CPointer(types.int64)), cache=True, error_model="numpy")(entry)


def run_in_parallel(function: Any, data: Any) -> None:
    """Has each thread that torch's operators run on call a compiled function with `data`."""
    parallel = _parallel()
    if parallel is None:
        function(data)
    else:
        parallel(function, data, AS_MANY_THREADS_AS_TORCH, 0)


@functools.cache
def _source_digest() -> str:
    """A digest of the sources of all kernels."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


@functools.cache
def _parallel() -> Any:
    """void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags); None in a
    process without such a runtime, where kernels run on one thread."""
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
    return function


@intrinsic(prefer_literal=True)
def unpack(typing: Any, arguments: Any, element: Any, stored: Any, kinds: Any) -> Any:
    """The tuple of a kernel's arguments, from eight bytes each."""
    of_kind = {
        "Elements": types.CPointer(element.instance_type),
        "Stored": types.CPointer(stored.instance_type),
        "Floats": types.CPointer(types.float32),
        "Integers": types.CPointer(types.int64),
        "Bytes": types.CPointer(types.uint8),
        "RowWords": types.CPointer(vnni.of_elements(element.instance_type)),
        "Quads": types.CPointer(vnni.quad),
        "Nibbles": types.CPointer(vnni.nibbles),
        "Codes": types.CPointer(vnni.codes),
        "int": types.int64,
        "float": types.float64,
    }
    result = types.Tuple([of_kind[kind] for kind in kinds.literal_value.split(",")])

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        values = []
        for i, kind in enumerate(result):
            value = builder.load(builder.gep(args[0], [ir.IntType(64)(i + 1)]))
            to = context.get_value_type(kind)
            if isinstance(kind, types.CPointer):
                value = builder.inttoptr(value, to)
            values.append(value if value.type == to else builder.bitcast(value, to))
        return context.make_tuple(builder, result, values)

    return result(arguments, element, stored, kinds), lower


@intrinsic
def fetch_add(typing: Any, counter: Any) -> Any:
    """The number of the next work item, from 0: no two threads get the same."""

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.atomic_rmw("add", args[0], ir.IntType(64)(1), "monotonic")

    return types.int64(counter), lower
