"""Records the kernels that a function of tensors calls, to run them again without the function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fastserve_kernels.cpu.kernels.kernel import record_call
from fastserve_kernels.cpu.kernels.program import Program

Result = TypeVar("Result")

ALIGNMENT = 64
"""Bytes of a line of the cache."""
NEW_TENSORS = (torch.ops.aten.new_empty.default, torch.ops.aten.empty.memory_format)


class NotRecordableError(Exception):
    """An operator was called that is no kernel of ours: what it computes would be computed but once."""


class Arena:
    """Memory of the tensors between recorded calls, used again when a tensor is gone.

    Recordings that never run at the same time may share one, each after a `release`.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._used: list[tuple[StorageWeakRef, np.ndarray]] = []

    @property
    def nbytes(self) -> int:
        """Bytes that it holds, used and free."""
        return sum(block.nbytes for block in [*self._free, *(block for _, block in self._used)])

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any content."""
        self._collect()
        size = max(1, torch.Size(shape).numel() * dtype.itemsize)
        fitting = [block for block in self._free if block.nbytes >= size]
        if fitting:
            block = min(fitting, key=lambda each: each.nbytes)
            self._free = [each for each in self._free if each is not block]
        else:
            block = _aligned(size)
        tensor = torch.from_numpy(block[:size]).view(dtype).view(shape)
        self._used.append((StorageWeakRef(tensor.untyped_storage()), block))
        return tensor

    def release(self) -> None:
        """Has the next recording use the memory of all tensors, of which some may still be there."""
        self._free += [block for _, block in self._used]
        self._used = []

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
    function: Callable[[], Result], implementations: Mapping[Any, Callable[..., Any]], arena: Arena
) -> tuple[Result, Program]:
    """Calls a function, whose kernels are not run; returns what it returns, and the program of its kernels.

    The result is filled when the program runs. Tensors that the function made lie in `arena`, and may hold
    others' numbers once they are gone; the others are kept by the program. `implementations`: of the
    operators that it may call (`operator_definition.CPU_IMPLEMENTATIONS`). Raises NotRecordableError if it
    calls another, and what the function raises.
    """
    calls: list[tuple[int, Any]] = []
    token = record_call.set(lambda address, arguments: calls.append((address, arguments)))
    recorder = _Recorder(arena, implementations)
    try:
        with recorder:
            result = function()
    finally:
        record_call.reset(token)
    return result, Program(calls, (arena, recorder.found))
