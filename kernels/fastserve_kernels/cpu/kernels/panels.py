"""How a linear is divided: into work items, panels of rows and blocks of columns; and a thread's workspace.

A *panel* is 32 rows of the weight, whose sums are computed together. A *block* is the columns that are added
up before they are scaled. A *work item* is a few panels for up to TOKENS tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import float32, njit

from fastserve_kernels.cpu.kernels.activations import (
    Words,
    as_elements,
    as_words,
    pack,
    sum_groups,
)
from fastserve_kernels.cpu.kernels.aligned_memory import allocate_floats, free_floats, round_up
from fastserve_kernels.cpu.kernels.kernel import Elements, Floats, Integers, WorkCounter, fetch_add
from fastserve_kernels.cpu.kernels.products import MAX_TOKENS, multiply_groups, width_for
from fastserve_kernels.cpu.kernels.vectors import (
    LANES,
    as_float32,
    at,
    load,
    load_masked,
    splat,
    store,
    store_masked,
)
from fastserve_kernels.cpu.kernels.vnni import PANEL_VECTORS, VECTOR_ROWS, columns_of

PANEL_ROWS = PANEL_VECTORS * VECTOR_ROWS
"""Rows of a panel."""
TOKENS = 256
"""Tokens whose activations are put into words at a time, and who meet codes that were unpacked once."""
SLICE = 256
"""Columns of a panel that meet all these tokens before the next ones do."""
BLOCK = 128
"""Columns that are added up before they are scaled, unless a group has fewer."""
RUN_BYTES = 1 << 19
"""Bytes of weights that lie together and go to one thread, at least, if there are enough for all; of a single
token, for several take as long by fewer."""
RUNS_PER_THREAD = 8
"""Runs of a thread, at least, so that the threads end together."""


class LinearShape(NamedTuple):
    """What is the same for all work items."""

    tokens: int
    out_features: int
    in_features: int
    x_stride: int
    padded: int
    """in_features in whole vectors."""
    block: int
    """Columns of a block."""
    groups: int
    """Groups of columns that share a scale: a block each, or one of all columns."""
    run: int
    """Panels of a work item, at least."""
    threads: int


class Outputs(NamedTuple):
    """Where the results go, and what is added to them."""

    bias: Elements
    residual: Elements
    out: Elements
    has_bias: int
    has_residual: int


class Workspace(NamedTuple):
    """A thread's own memory."""

    words: Words
    """[tokens / 8, padded, W] activations."""
    sums: Floats
    """[tokens / 8, groups, 8] of the activations."""
    x_scales: Floats
    """[tokens / 8, blocks, 8] of activations that are quantized by blocks."""
    acc: Floats
    """[tokens, PANEL_ROWS]."""
    scales: Floats
    """[groups, PANEL_ROWS] of a panel."""
    zeros: Floats
    """[groups, PANEL_ROWS] of a panel, times their scales, negative."""
    expanded: Words
    """[SLICE, PANEL_ROWS] of a panel."""


class WorkItem(NamedTuple):
    """Panels `first` to `end`, for tokens `token` to token + tokens."""

    first: int
    end: int
    token: int
    tokens: int


@njit(error_model="numpy")
def shape_for(
    tokens: int,
    out_features: int,
    in_features: int,
    x_stride: int,
    multiple: int,
    group: int,
    weight_bytes: int,
    threads: int,
) -> LinearShape:
    """`group` columns share a scale: 32, 64, 128, or all of them."""
    panels = (out_features + PANEL_ROWS - 1) // PANEL_ROWS
    run = max(
        1,
        min(RUN_BYTES * panels // max(1, tokens * weight_bytes), panels // (RUNS_PER_THREAD * threads)),
    )
    padded = round_up(in_features, multiple)
    shared = group >= in_features
    block = BLOCK if shared else group
    groups = 1 if shared else in_features // group
    return LinearShape(tokens, out_features, in_features, x_stride, padded, block, groups, run, threads)


@njit(error_model="numpy")
def allocate_workspace(shape: LinearShape, x: Elements) -> Workspace:
    """A workspace, to be freed by `free_workspace`."""
    tokens = round_up(min(shape.tokens, TOKENS), MAX_TOKENS)
    words = (tokens if shape.tokens > MAX_TOKENS else width_for(shape.tokens)) * shape.padded
    sums = tokens * max(shape.groups, VECTOR_ROWS)
    x_scales = tokens * blocks_of(shape)
    acc = tokens * PANEL_ROWS
    scales = shape.groups * PANEL_ROWS
    size = words + sums + x_scales + acc + 2 * scales + SLICE * PANEL_ROWS
    workspace = allocate_floats(size)
    to_sums = at(workspace, words)
    to_x_scales = at(to_sums, sums)
    to_acc = at(to_x_scales, x_scales)
    to_scales = at(to_acc, acc)
    to_zeros = at(to_scales, scales)
    expanded = as_words(x, at(to_zeros, scales))
    return Workspace(as_words(x, workspace), to_sums, to_x_scales, to_acc, to_scales, to_zeros, expanded)


@njit(error_model="numpy")
def blocks_of(shape: LinearShape) -> int:
    """The blocks of a row."""
    return (shape.padded + shape.block - 1) // shape.block


@njit(error_model="numpy")
def next_work_item(counter: WorkCounter, shape: LinearShape) -> WorkItem:
    """The next work item; beyond the last, one of no tokens.

    It is a thread's share of half of the panels that are left: few items are begun, for that takes a
    microsecond in which nothing is read ahead, and yet the threads end together."""
    panels = (shape.out_features + PANEL_ROWS - 1) // PANEL_ROWS
    first, size, token = 0, 0, 0
    for _ in range(fetch_add(counter) + 1):
        first += size
        if first == panels:
            first, token = 0, token + TOKENS
        left = panels - first
        size = min(left, max(shape.run, left // (2 * shape.threads)))
    return WorkItem(first, first + size, token, max(0, min(TOKENS, shape.tokens - token)))


@njit(error_model="numpy")
def free_workspace(workspace: Workspace) -> None:
    """Frees what `allocate_workspace` allocated."""
    free_floats(as_float32(workspace.words))


@njit(error_model="numpy")
def take_work_item(
    counter: WorkCounter, shape: LinearShape, workspace: Workspace, x: Elements, packed: int, with_sums: bool
) -> WorkItem:
    """The next work item, whose tokens are in workspace; `packed` is the first one of those that are
    already."""
    item = next_work_item(counter, shape)
    if item.tokens > 0 and item.token != packed:
        _pack(shape, workspace, x, item, with_sums)
    return item


@njit(error_model="numpy")
def _pack(shape: LinearShape, workspace: Workspace, x: Elements, item: WorkItem, with_sums: bool) -> None:
    for t in range(0, item.tokens, MAX_TOKENS):
        start, count = (item.token + t) * shape.x_stride, min(MAX_TOKENS, item.tokens - t)
        to = at(workspace.words, t * (shape.padded // columns_of(workspace.words)))
        pack(x, start, shape.x_stride, shape.in_features, shape.padded, count, to)
        if with_sums:
            sums = at(workspace.sums, t * shape.groups)
            group = shape.block if shape.groups > 1 else shape.in_features
            sum_groups(x, start, shape.x_stride, shape.in_features, group, shape.groups, count, sums)


@njit(error_model="numpy")
def zero_acc(workspace: Workspace, tokens: int) -> None:
    """Sets the accumulators to 0."""
    for i in range(0, tokens * PANEL_ROWS, LANES):
        store(workspace.acc, i, splat(float32(0), LANES))


@njit(error_model="numpy")
def init_acc_from_zeros(shape: LinearShape, workspace: Workspace, tokens: int) -> None:
    """Sets the accumulators to what the zeros of a panel's groups make of the sums of the activations."""
    for t in range(0, tokens, MAX_TOKENS):
        sums, acc = at(workspace.sums, t * shape.groups), at(workspace.acc, t * PANEL_ROWS)
        multiply_groups(workspace.zeros, sums, min(MAX_TOKENS, tokens - t), shape.groups, acc)


@njit(error_model="numpy")
def store_panel(
    shape: LinearShape, workspace: Workspace, outputs: Outputs, item: WorkItem, panel: int
) -> None:
    """The results of a panel from its accumulators."""
    row = panel * PANEL_ROWS
    for t in range(item.tokens):
        place = (item.token + t) * shape.out_features + row
        for i in range(0, PANEL_ROWS, LANES):
            store_vector(shape, outputs, load(workspace.acc, t * PANEL_ROWS + i, LANES), place + i, row + i)


@njit(error_model="numpy")
def store_vector(shape: LinearShape, outputs: Outputs, y: Any, place: int, row: int) -> None:
    """LANES results, of which the last rows may not be there."""
    left = shape.out_features - row
    if outputs.has_bias:
        y = y + load_masked(outputs.bias, row, left)
    if outputs.has_residual:
        y = y + load_masked(outputs.residual, place, left)
    store_masked(outputs.out, place, y, left)


@njit(error_model="numpy")
def scatter_panel(
    workspace: Workspace, outputs: Outputs, item: WorkItem, rows: Integers, count: int, out_features: int
) -> None:
    """The results of a panel of `count` rows from its accumulators, each to row rows[i] of the output."""
    buffer = as_elements(outputs.out, workspace.expanded)
    for t in range(item.tokens):
        acc, place = at(workspace.acc, t * PANEL_ROWS), (item.token + t) * out_features
        if outputs.has_bias:
            _add_rows(acc, outputs.bias, rows, count, buffer)
        if outputs.has_residual:
            _add_rows(acc, at(outputs.residual, place), rows, count, buffer)
        for i in range(0, PANEL_ROWS, LANES):
            store(buffer, i, load(acc, i, LANES))
        to = at(outputs.out, place)
        if count == PANEL_ROWS:  # a number that the compiler knows: no loop is left
            for i in range(PANEL_ROWS):
                to[rows[i]] = buffer[i]
        else:
            for i in range(count):
                to[rows[i]] = buffer[i]


@njit(error_model="numpy")
def _add_rows(acc: Floats, source: Elements, rows: Integers, count: int, buffer: Elements) -> None:
    for i in range(count):
        buffer[i] = source[rows[i]]
    for i in range(0, PANEL_ROWS, LANES):
        store(acc, i, load(acc, i, LANES) + load_masked(buffer, i, count - i))
