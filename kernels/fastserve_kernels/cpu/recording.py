"""Records the kernels that a function of tensors calls, to run them again without the function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fastserve_kernels.cpu.kernels.kernel import record_call
from fastserve_kernels.cpu.kernels.program import Call, Program

Result = TypeVar("Result")

ALIGNMENT = 64
"""Bytes of a line of the cache."""
NEW_TENSORS = (torch.ops.aten.new_empty.default, torch.ops.aten.empty.memory_format)


class NotRecordableError(Exception):
    """An operator was called that is no kernel of ours: what it computes would be computed but once."""


class Arena:
    """Memory of the tensors between recorded calls, used again when a tensor is gone.

    A second recording of the same calls, of fewer rows, gets the same memory after a `rewind`.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._used: list[tuple[StorageWeakRef, np.ndarray]] = []
        self._given: list[np.ndarray] = []
        """The memory of all tensors, in the order in which it was asked for."""
        self._rewound: Iterator[np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it holds, used and free."""
        return sum({id(block): block.nbytes for block in self._given}.values())

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any content. Raises NotRecordableError if one was not asked for before the `rewind`."""
        size = max(1, torch.Size(shape).numel() * dtype.itemsize)
        block = self._take(size) if self._rewound is None else next(self._rewound, None)
        if block is None or block.nbytes < size:
            raise NotRecordableError("fewer rows take other memory")
        tensor = torch.from_numpy(block[:size]).view(dtype).view(shape)
        self._used.append((StorageWeakRef(tensor.untyped_storage()), block))
        return tensor

    def rewind(self) -> None:
        """Gives the tensors to come the memory that was given so far, in the same order."""
        self._rewound = iter(self._given)

    def _take(self, size: int) -> np.ndarray:
        self._collect()
        fitting = [block for block in self._free if block.nbytes >= size]
        if fitting:
            block = min(fitting, key=lambda each: each.nbytes)
            self._free = [each for each in self._free if each is not block]
        else:
            block = _aligned(size)
        self._given.append(block)
        return block

    def __contains__(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor, or the one that it is a view of, lies in it."""
        if tensor.is_mkldnn:
            return False
        storage = StorageWeakRef(tensor.untyped_storage())
        return any(storage == used for used, _ in self._used)

    def _collect(self) -> None:
        self._free += [block for storage, block in self._used if storage.expired()]
        self._used = [pair for pair in self._used if not pair[0].expired()]


def _aligned(size: int) -> np.ndarray:
    memory = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + size]


class _Recorder(TorchDispatchMode):
    """Gives new tensors memory of the arena, and has kernels recorded in place of being run."""

    def __init__(self, arena: Arena, implementations: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self._arena = arena
        self._implementations = implementations
        self.found: list[torch.Tensor] = []
        """The operators' operands, those excepted that lie in the arena."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch.compile is of no concern here, and to be excluded from it takes the second of its import."""
        return False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        implementation = self._implementations.get(function)
        if implementation is not None:
            self.found += [
                each for each in args if isinstance(each, torch.Tensor) and each not in self._arena
            ]
            with self:  # what it asks torch for is to come here too
                return implementation(*args, **kwargs)
        if function in NEW_TENSORS:
            like = args[0] if isinstance(args[0], torch.Tensor) else None
            shape = args[0] if like is None else args[1]
            dtype = kwargs.get("dtype") or (torch.get_default_dtype() if like is None else like.dtype)
            return self._arena.empty(tuple(shape), dtype)
        if function.is_view:
            result = function(*args, **kwargs)
            views = [result] if isinstance(result, torch.Tensor) else result
            if all(
                each.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr() for each in views
            ):
                return result  # some of them, as `contiguous`, copy where they must
        raise NotRecordableError(f"{function} is no kernel that can be recorded")


def record(
    function: Callable[[int], Result],
    max_rows: int,
    implementations: Mapping[Any, Callable[..., Any]],
    arena: Arena,
) -> tuple[Result, Program]:
    """Calls a function of a number of rows, at least 1, whose kernels are not run; returns what it returns
    for `max_rows`, and the program of its kernels, which is of any number up to that (`Program.resize`).

    The result is filled when the program runs. Tensors that the function made lie in `arena`, a new one, and
    may hold others' numbers once they are gone; the others are kept by the program. `implementations`: of the
    operators that it may call (`operator_definition.CPU_IMPLEMENTATIONS`). Raises NotRecordableError if it
    calls another, and if what the kernels are called with depends on the number of rows in another way than
    by being this number: the function is called with three to see that. Raises what the function raises.
    """
    result, calls, operands = _record_calls(functools.partial(function, max_rows), implementations, arena)
    row_words: set[tuple[int, int]] | None = None
    for rows in {1, max(1, max_rows - 1)} - {max_rows}:
        arena.rewind()
        _, others, _ = _record_calls(functools.partial(function, rows), implementations, arena)
        found = _row_words(calls, max_rows, others, rows)
        if row_words is not None and found != row_words:
            raise NotRecordableError("another argument depends on the number of rows for each number")
        row_words = found
    return result, Program(calls, (arena, operands), sorted(row_words or ()))


def _row_words(
    calls: Sequence[Call], rows: int, others: Sequence[Call], other_rows: int
) -> set[tuple[int, int]]:
    """The call and the word of each argument that is the number of rows."""
    if [address for address, _ in calls] != [address for address, _ in others]:
        raise NotRecordableError("other kernels are called for fewer rows")
    found = set()
    for number, ((_, ours), (_, theirs)) in enumerate(zip(calls, others, strict=True)):
        for word, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if one != other:
                if (one, other) != (rows, other_rows):
                    raise NotRecordableError(f"{rows} rows have an argument {one}, {other_rows} rows {other}")
                found.add((number, word))
    return found


def _record_calls(
    function: Callable[[], Result], implementations: Mapping[Any, Callable[..., Any]], arena: Arena
) -> tuple[Result, list[Call], list[torch.Tensor]]:
    """What the function returns, the kernels' calls, and the operands that lie elsewhere than in `arena`."""
    calls: list[Call] = []
    token = record_call.set(lambda address, arguments: calls.append((address, list(arguments))))
    recorder = _Recorder(arena, implementations)
    try:
        with recorder:
            result = function()
    finally:
        record_call.reset(token)
    return result, calls, recorder.found
