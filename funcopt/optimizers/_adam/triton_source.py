"""The step in one pass, as Triton source: what each program of a launch does.

A program moves some blocks of one member of one leaf. Which those are and where they lie it reads
from a table of 64-bit words, built by `triton.py`:

- for each leaf: its first program; the programs of a member; the elements of a member;
- for each leaf: the addresses of param, grad, exp_avg, exp_avg_sq (and max_exp_avg_sq) before the
  step, and of the same without grad after it;
- how many programs of this launch are done: 0 before it and after it;
- for each leaf, if it is rounded by chance: which leaf of the whole tree it is.

The numbers are arguments, 64 bits each: the bits of a float64, or the address of a tensor. What a
number is, is said by four bits of `kinds`, the lowest ones for the first: 1 for an address, 2 for
one of float32, not float64, 4 for one of a value for each member.
"""

# Triton ships no types. This file is the border: what comes of Triton is untyped here, and what is
# told to the type checker is no more than that.
# mypy: disable-error-code="import-untyped, import-not-found"
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # pragma: no cover
    triton = None

from .triton_numbers import jit, moves_of, number, numbers_of
from .triton_round import rounded


def stream_of(index: int) -> int:
    """Return the stream that launches on a device go to; 0 where the interpreter serves the CPU."""
    stream: int = triton.runtime.driver.active.get_current_stream(index) if index >= 0 else 0
    return stream


def is_compiled(kernel: Any) -> bool:
    """Whether what a launch returned is a compiled kernel, which can be launched as it is."""
    return triton is not None and isinstance(kernel, triton.compiler.CompiledKernel)


def plain_launch_of(kernel: Any) -> tuple[int, int, int] | None:
    """Return what a plain launch of a compiled kernel takes: handle, threads, and shared memory.

    None if it wants more than that, or if this Triton keeps it elsewhere: all of it is private.
    """
    try:
        kernel._init_handles()
        known = kernel.metadata
        more = (
            *(known.num_ctas - 1, known.global_scratch_size, known.profile_scratch_size),
            *(known.launch_cooperative_grid, known.launch_pdl),
            getattr(known, "instrumentation_mode", None),
        )
        launches_are_watched()
        plain = int(kernel.function), 32 * known.num_warps, int(known.shared)
    except (AttributeError, TypeError):
        return None
    return None if any(more) else plain


def launches_are_watched() -> bool:
    """Whether somebody has asked Triton to be told of each launch."""
    runtime = triton.knobs.runtime
    return _has_calls(runtime.launch_enter_hook) or _has_calls(runtime.launch_exit_hook)


def _has_calls(hook: Any) -> bool:
    return hook is not None and getattr(hook, "calls", True) != []


_INTEGERS = (
    *("leaves", "run", "step", "lr", "beta1", "beta2", "eps", "weight_decay", "key", "active"),
    *("grad_scale", "kinds", "new_count", "applies"),
)


def _entry(function: Any) -> Any:
    # An integer gets no kernel of its own for being 1, or a multiple of 16.
    return function if triton is None else triton.jit(function, do_not_specialize=_INTEGERS)


# Capitals are what is fixed at compilation, as in Triton's own sources.
# ruff: noqa: N803, N806, SIM300


@_entry
def step_kernel(
    table,
    leaves,
    run,
    step: tl.int64,
    lr: tl.int64,
    beta1: tl.int64,
    beta2: tl.int64,
    eps: tl.int64,
    weight_decay: tl.int64,
    key: tl.int64,
    active: tl.int64,
    grad_scale: tl.int64,
    kinds: tl.int64,
    new_count: tl.int64,
    applies: tl.int64,
    DTYPE: tl.constexpr,
    SLOT_DTYPE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    CONDITIONAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move `run` blocks of BLOCK elements, or as many as are left of the member.

    Where `new_count` is an address, `step` is that of the count before this update, and the count
    after it is written. If CONDITIONAL, everything stays as it was where the bool at the address
    `applies` is False, if there is one, and a member does where its number `active` is 0.
    """
    TENSORS: tl.constexpr = 9 if AMSGRAD else 7
    leaf = _leaf_of(tl.program_id(0), table, leaves)
    member, first, begin, size = _share_of(leaf, table, leaves, run, BLOCK)
    start, slot_start = first * _bytes_of(DTYPE), first * _bytes_of(SLOT_DTYPE)
    addresses = table + 3 * leaves + leaf
    olds = _before(addresses, leaves, start, slot_start, AMSGRAD)
    news = _after(addresses + (TENSORS // 2 + 1) * leaves, leaves, start, slot_start, AMSGRAD)
    aligned = _are_aligned(olds, news)
    words = (step, lr, beta1, beta2, eps, weight_decay, key, active, grad_scale)
    rows = (member, leaf.to(tl.int64))
    count = number(step, kinds, 0, rows)
    updates = tl.where(new_count != 0, count + 1.0, count)
    numbers = numbers_of(words, kinds, updates, rows, DTYPE)
    done = table + (3 + TENSORS) * leaves
    leaf_id = tl.load(done + 1 + leaf) if STOCHASTIC else 0
    chance = (number(key, kinds, 6, rows).to(tl.int64), leaf_id, updates.to(tl.int64), begin)
    made = moves_of(applies, active, kinds, rows) if CONDITIONAL else True
    if made:
        given = (olds, news, numbers, chance, size, aligned)
        _move_all(given, DTYPE, SLOT_DTYPE, AMSGRAD, MAXIMIZE, STOCHASTIC, BLOCK)
    elif news[0] != olds[0]:
        _copy_all(olds, news, size, DTYPE, SLOT_DTYPE, AMSGRAD, BLOCK)
    if new_count != 0:
        reached = tl.where(made, updates, count)
        _write_count(done, new_count, reached)


@jit
def _leaf_of(program, table, leaves):
    """Return the last leaf whose first program is not after this one."""
    low = 0
    high = leaves
    while high - low > 1:
        middle = (low + high) // 2
        beyond = tl.load(table + middle) > program
        low = tl.where(beyond, low, middle)
        high = tl.where(beyond, middle, high)
    return low


@jit
def _bytes_of(DTYPE: tl.constexpr):
    return DTYPE.primitive_bitwidth // 8


@jit
def _share_of(leaf, table, leaves, run, BLOCK: tl.constexpr):
    """Return what this program moves: of which member, where that begins, and how much it is.

    It begins at an element of the leaf, and at one of the member.
    """
    place = (tl.program_id(0) - tl.load(table + leaf)).to(tl.int32)
    programs = tl.load(table + leaves + leaf).to(tl.int32)
    elements = tl.load(table + 2 * leaves + leaf)
    member = (place // programs).to(tl.int64)
    begin = (place % programs).to(tl.int64) * run * BLOCK
    size = tl.minimum(elements - begin, run * BLOCK).to(tl.int32)
    return member, member * elements + begin, begin, size


@jit
def _before(addresses, leaves, start, slot_start, AMSGRAD: tl.constexpr):
    """Return where what a program reads begins."""
    param = tl.load(addresses) + start
    grad = tl.load(addresses + leaves) + start
    exp_avg = tl.load(addresses + 2 * leaves) + slot_start
    exp_avg_sq = tl.load(addresses + 3 * leaves) + slot_start
    largest = exp_avg_sq
    if AMSGRAD:
        largest = tl.load(addresses + 4 * leaves) + slot_start
    return param, grad, exp_avg, exp_avg_sq, largest


@jit
def _are_aligned(olds, news):
    """Whether all begin at multiples of 16 bytes."""
    spread = olds[0] | olds[1] | olds[2] | olds[3] | olds[4]
    return ((spread | news[0] | news[1] | news[2] | news[3]) & 15) == 0


@jit
def _after(addresses, leaves, start, slot_start, AMSGRAD: tl.constexpr):
    """Return where what it writes begins."""
    param = tl.load(addresses) + start
    exp_avg = tl.load(addresses + leaves) + slot_start
    exp_avg_sq = tl.load(addresses + 2 * leaves) + slot_start
    largest = exp_avg_sq
    if AMSGRAD:
        largest = tl.load(addresses + 3 * leaves) + slot_start
    return param, exp_avg, exp_avg_sq, largest


@jit
def _write_count(done, new_count, count):
    """Let the program that is the last to finish write the count, in whatever order they run.

    In place, the count is written where every program reads it. Each counts itself as done when all
    its threads have read, and whoever finds that all others are done finds that all have read. A
    launch that follows on the same stream begins with none that is done.
    """
    tl.debug_barrier()
    others = tl.atomic_add(done, 1)
    if others == tl.num_programs(0) - 1:
        tl.store(done, 0)
        tl.store(new_count.to(tl.pointer_type(tl.float64)), count)


@jit
def _move_all(
    given,
    DTYPE: tl.constexpr,
    SLOT_DTYPE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    olds, news, numbers, chance, size, aligned = given
    offset = 0
    while offset < size:
        # Whole blocks in aligned memory are moved 16 bytes at a time, which a mask would forbid.
        if aligned & (size - offset >= BLOCK):
            _move(
                olds,
                news,
                numbers,
                chance,
                offset,
                size,
                DTYPE,
                SLOT_DTYPE,
                AMSGRAD,
                MAXIMIZE,
                STOCHASTIC,
                BLOCK,
                True,
            )
        else:
            _move(
                olds,
                news,
                numbers,
                chance,
                offset,
                size,
                DTYPE,
                SLOT_DTYPE,
                AMSGRAD,
                MAXIMIZE,
                STOCHASTIC,
                BLOCK,
                False,
            )
        offset += BLOCK


@jit
def _move(
    olds,
    news,
    numbers,
    chance,
    offset,
    size,
    DTYPE: tl.constexpr,
    SLOT_DTYPE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Move one block: the equations of `plain`, in the same order but for weight decay."""
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    kept, decay, gain1, beta2, gain2, step_size, correction2_root, eps, grad_scale = numbers
    lanes = tl.arange(0, BLOCK)
    mask = None if WHOLE else lanes < size - offset
    param = tl.load(_pointers(olds[0], offset, lanes, DTYPE, WHOLE), mask=mask).to(COMPUTE)
    grad = tl.load(_pointers(olds[1], offset, lanes, DTYPE, WHOLE), mask=mask).to(COMPUTE)
    exp_avg = tl.load(_pointers(olds[2], offset, lanes, SLOT_DTYPE, WHOLE), mask=mask).to(COMPUTE)
    squares = _pointers(olds[3], offset, lanes, SLOT_DTYPE, WHOLE)
    exp_avg_sq = tl.load(squares, mask=mask).to(COMPUTE)

    grad = (grad * grad_scale).to(DTYPE).to(COMPUTE)
    if MAXIMIZE:
        grad = -grad
    # As torch.lerp, which takes the end that is nearer.
    toward = grad - exp_avg
    exp_avg = tl.where(gain1 < 0.5, exp_avg + gain1 * toward, grad - toward * (1.0 - gain1))
    exp_avg_sq = exp_avg_sq * beta2 + (grad * gain2) * grad
    largest = exp_avg_sq
    if AMSGRAD:
        maxima = _pointers(olds[4], offset, lanes, SLOT_DTYPE, WHOLE)
        largest = tl.load(maxima, mask=mask).to(COMPUTE)
        largest = tl.maximum(largest, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
        _store(news[3], largest, chance, offset, lanes, mask, 3, SLOT_DTYPE, STOCHASTIC, WHOLE)
    denominator = _quotient(_root(largest, DTYPE), correction2_root, DTYPE) + eps
    # A factor just below 1 has hardly a digit of the decay, and is off the same way at each step.
    # So decay and step are added up, and taken from the parameter with a single rounding.
    decrease = tl.where(tl.abs(param) < float("inf"), param, 0.0) * decay
    decrease += _quotient(exp_avg * step_size, denominator, DTYPE)
    param = param * kept - decrease

    _store(news[0], param, chance, offset, lanes, mask, 0, DTYPE, STOCHASTIC, WHOLE)
    _store(news[1], exp_avg, chance, offset, lanes, mask, 1, SLOT_DTYPE, STOCHASTIC, WHOLE)
    _store(news[2], exp_avg_sq, chance, offset, lanes, mask, 2, SLOT_DTYPE, STOCHASTIC, WHOLE)


@jit
def _store(
    address,
    values,
    chance,
    offset,
    lanes,
    mask,
    COLUMN: tl.constexpr,
    DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Write values as they are kept."""
    kept = rounded(values, chance, offset + lanes, COLUMN, DTYPE, STOCHASTIC)
    tl.store(_pointers(address, offset, lanes, DTYPE, WHOLE), kept, mask=mask)


@jit
def _copy_all(
    olds,
    news,
    size,
    DTYPE: tl.constexpr,
    SLOT_DTYPE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy all blocks, to the bit."""
    offset = 0
    while offset < size:
        _copy(olds[0], news[0], offset, size, DTYPE, BLOCK)
        _copy(olds[2], news[1], offset, size, SLOT_DTYPE, BLOCK)
        _copy(olds[3], news[2], offset, size, SLOT_DTYPE, BLOCK)
        if AMSGRAD:
            _copy(olds[4], news[3], offset, size, SLOT_DTYPE, BLOCK)
        offset += BLOCK


@jit
def _copy(old, new, offset, size, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    mask = lanes < size - offset
    values = tl.load(_pointers(old, offset, lanes, DTYPE, False), mask=mask)
    tl.store(_pointers(new, offset, lanes, DTYPE, False), values, mask=mask)


@jit
def _pointers(address, offset, lanes, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    first = (address + offset * (DTYPE.primitive_bitwidth // 8)).to(tl.pointer_type(DTYPE))
    if WHOLE:
        first = tl.multiple_of(first, 16)
    return first + lanes


@jit
def _root(squares, DTYPE: tl.constexpr):
    """The square root. In float32, plain `sqrt` would take what is below 1e-38 for zero."""
    return tl.sqrt(squares) if DTYPE == tl.float64 else tl.sqrt_rn(squares)


@jit
def _quotient(numerator, denominator, DTYPE: tl.constexpr):
    """The quotient: correctly rounded, but for leaves whose own rounding is far coarser."""
    return tl.div_rn(numerator, denominator) if DTYPE == tl.float32 else numerator / denominator
