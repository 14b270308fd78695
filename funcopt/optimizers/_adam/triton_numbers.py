"""The numbers of a step as Triton source: what they are, and what they come to."""

# As in `triton_source.py`, what comes of Triton is untyped.
# mypy: disable-error-code="import-untyped, import-not-found"
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # pragma: no cover
    triton = None


def jit(function: Any) -> Any:
    """Compile a function for Triton; without Triton a file can be imported, and nothing run."""
    return function if triton is None else triton.jit(function)


# Capitals are what is fixed at compilation, as in Triton's own sources.
# ruff: noqa: N803, N806, SIM300


@jit
def numbers_of(words, kinds, step, rows, DTYPE: tl.constexpr):
    """Return what the numbers of a member come to, found in float64 and rounded once."""
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    lr = number(words[1], kinds, 1, rows)
    beta1 = number(words[2], kinds, 2, rows)
    beta2 = number(words[3], kinds, 3, rows)
    eps = number(words[4], kinds, 4, rows)
    weight_decay = number(words[5], kinds, 5, rows)
    grad_scale = number(words[8], kinds, 8, rows)
    # A decay of less than half of a parameter is subtracted; where less is left, that is a factor.
    decay = lr * weight_decay
    kept = tl.where(decay < 0.5, 1.0, 1.0 - decay)
    decay = tl.where(decay < 0.5, decay, 0.0)
    step_size = lr / one_minus_power(beta1, step)
    correction2_root = tl.sqrt(one_minus_power(beta2, step))
    return (
        kept.to(COMPUTE),
        decay.to(COMPUTE),
        (1.0 - beta1).to(COMPUTE),
        beta2.to(COMPUTE),
        (1.0 - beta2).to(COMPUTE),
        step_size.to(COMPUTE),
        correction2_root.to(COMPUTE),
        eps.to(COMPUTE),
        grad_scale.to(COMPUTE),
    )


@jit
def number(word, kinds, INDEX: tl.constexpr, rows):
    """Return a number of a member and leaf in float64, whichever kind it is of."""
    member, leaf = rows
    kind = kinds >> (4 * INDEX)
    place = word.to(tl.int64)
    value = place.to(tl.float64, bitcast=True)
    if (kind & 1) != 0:
        offset = tl.where((kind & 4) != 0, member, tl.where((kind & 8) != 0, leaf, 0))
        if (kind & 2) != 0:
            value = tl.load(place.to(tl.pointer_type(tl.float32)) + offset).to(tl.float64)
        else:
            value = tl.load(place.to(tl.pointer_type(tl.float64)) + offset)
    return value


@jit
def moves_of(applies, active, kinds, rows):
    """Whether the step is made, and by this member."""
    moves = number(active, kinds, 7, rows) != 0.0
    if applies != 0:
        moves &= tl.load(applies.to(tl.pointer_type(tl.int8))) != 0
    return moves


@jit
def one_minus_power(beta, step):
    """Return 1 - beta**step to the last digits, also where the power is nearly 1.

    There the subtraction leaves few digits. Its error is the power's rounding, and the logarithm of
    the rounded power knows it: (1 - u) * (log of the power) / (log of u) has it divided out.
    """
    power = tl.where(beta > 0.0, tl.exp2(step * tl.log2(tl.where(beta > 0.0, beta, 0.5))), 0.0)
    difference = 1.0 - power
    if (power > 0.5) & (power < 1.0):
        difference *= step * tl.log2(beta) / tl.log2(power)
    return difference
