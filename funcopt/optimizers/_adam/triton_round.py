"""Rounding to 16 bits as Triton source: to the nearest number, or by chance.

The bits that decide by chance are those of `_engine/rounding.py`, where it is said which element
has which of them.
"""

# As in `triton_source.py`, what comes of Triton is untyped.
# mypy: disable-error-code="import-untyped, import-not-found"
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from contextlib import suppress

from .triton_numbers import jit

with suppress(ImportError):
    import triton.language as tl


# Capitals are what is fixed at compilation, as in Triton's own sources.
# ruff: noqa: N803, SIM300


@jit
def rounded(values, chance, places, COLUMN: tl.constexpr, DTYPE: tl.constexpr, BY: tl.constexpr):
    """Return values as they are stored, from `places` on behind where the program begins."""
    if BY and DTYPE.primitive_bitwidth == 16:
        key, leaf, step, begin = chance
        wide = values.to(tl.float32)
        bits = wide.to(tl.int32, bitcast=True)
        rest = bits & 0x7FFFFFFF
        random = random_bits(key, leaf, step, begin + places, COLUMN)
        if DTYPE == tl.bfloat16:  # noqa: SIM108  # which Triton compiles apart
            size = _bfloat16(rest, random)
        else:
            size = _float16(rest, random)
        # The sign is the highest bit, which zero keeps, too: the other 31 are those of `rest`.
        signed = (size.to(tl.int32, bitcast=True) | (bits ^ rest)).to(tl.float32, bitcast=True)
        result = tl.where(rest < 0x7F800000, signed, wide).to(DTYPE)
    else:
        result = values.to(DTYPE)
    return result


@jit
def random_bits(key, leaf, step, elements, COLUMN: tl.constexpr):
    """Return 16 random bits for each element of a leaf."""
    call = elements // 512 * 64 + elements % 64
    place = (elements // 64 % 8).to(tl.int32)
    one = call.to(tl.uint32)
    two = (COLUMN | leaf << 3).to(tl.uint32) + tl.zeros_like(one)
    three = step.to(tl.uint32) + tl.zeros_like(one)
    four = ((call >> 32) & 0xFFFF).to(tl.uint32) | ((step >> 32) << 16).to(tl.uint32)
    one, two, three, four = tl.philox(key, one, two, three, four)
    word = place % 4
    low = tl.where(word == 0, one, tl.where(word == 1, two, tl.where(word == 2, three, four)))
    return (tl.where(place < 4, low, low >> 16) & 0xFFFF).to(tl.int32)


@jit
def _bfloat16(rest, random):
    up = (tl.minimum(rest, 0x7F7FFFFF) + random) >> 16 << 16
    return tl.minimum(up, 0x7F7F0000).to(tl.float32, bitcast=True)


@jit
def _float16(rest, random):
    """Below 2**-14, numbers are multiples of 2**-24."""
    normal = (tl.minimum(rest, 0x7F7FFFFF) + (random >> 3)) >> 13 << 13
    is_small = rest < 0x38800000
    multiple = tl.where(is_small, rest, 0).to(tl.float32, bitcast=True) * 16777216.0
    whole = tl.floor(multiple)
    up = ((multiple - whole) * 65536.0 > random.to(tl.float32)).to(tl.float32)
    small = (whole + up) * (1.0 / 16777216.0)
    return tl.minimum(tl.where(is_small, small, normal.to(tl.float32, bitcast=True)), 65504.0)
