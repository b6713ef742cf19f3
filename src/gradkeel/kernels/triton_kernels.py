"""What `triton_host` launches: sums of powers of many tensors, put together by tensor, and scaling.

A tensor is cut into pieces; a row of the table ``pieces`` is the address of one, its number of entries, and the index
of its tensor. One program works on one piece. Sums are float64 whatever the entries are.
"""

import triton
import triton.language as tl


@triton.jit
def _magnitudes(data, at, mask, IS_MASKED: tl.constexpr):
    """Magnitudes as float64; 0 beyond the end."""
    if IS_MASKED:
        x = tl.load(data + at, mask=mask, other=0.0)
    else:
        x = tl.load(data + at)
    return tl.abs(x.to(tl.float64))


@triton.jit
def _largest(data, count, BLOCK: tl.constexpr):
    """The largest magnitude of a piece, or 1 where that is 0 or not finite."""
    most = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, _magnitudes(data, at, at < count, IS_MASKED=True))
    largest = tl.max(most, axis=0)
    return tl.where((largest > 0) & (largest < float("inf")), largest, 1.0)


@triton.jit
def sum_powers(
    pieces,
    sums,
    scales,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    IS_SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For each piece, ``sums`` and ``scales``: the sum of ``(|x| / scale)^p``, where float64 needs a scale."""
    piece = tl.program_id(0)
    row = pieces + 3 * piece
    data = tl.multiple_of(tl.load(row).to(tl.pointer_type(DTYPE)), ALIGNMENT)
    count = tl.load(row + 1)
    scale = 1.0
    if DTYPE == tl.float64:  # noqa: SIM300  # a type, written large as Triton's constants are
        scale = _largest(data, count, BLOCK)
    whole = count // BLOCK * BLOCK
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, whole, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = _magnitudes(data, at, at < count, IS_MASKED=False) / scale
        total += x * x if IS_SQUARED else x
    at = whole + tl.arange(0, BLOCK)
    x = _magnitudes(data, at, at < count, IS_MASKED=True) / scale
    total += x * x if IS_SQUARED else x
    found = tl.sum(total, axis=0)
    tl.store(sums + piece, found)
    # A piece of zeros must not keep the scale of the whole from being as small as the other pieces need it.
    tl.store(scales + piece, tl.where(found == 0, 0.0, scale))


@triton.jit
def join_powers(sums, scales, spans, norms, IS_SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    """The norm of each tensor from its pieces, which are those from the span's first on, as many as it says."""
    tensor = tl.program_id(0)
    first = tl.load(spans + 2 * tensor)
    count = tl.load(spans + 2 * tensor + 1)
    most = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.load(scales + first + at, mask=at < count, other=0.0))
    scale = tl.max(most, axis=0)
    scale = tl.where(scale > 0, scale, 1.0)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        share = tl.load(scales + first + at, mask=at < count, other=0.0) / scale
        powers = tl.load(sums + first + at, mask=at < count, other=0.0)
        total += powers * (share * share if IS_SQUARED else share)
    found = tl.sum(total, axis=0)
    tl.store(norms + tensor, scale * (tl.sqrt(found) if IS_SQUARED else found))


@triton.jit
def scale_pieces(
    pieces,
    factors,
    stride,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiplies each piece by its tensor's factor, in the type ``WIDE``; where that is 1 nothing is touched."""
    row = pieces + 3 * tl.program_id(0)
    factor = tl.load(factors + stride * tl.load(row + 2)).to(WIDE)
    if factor != 1.0:
        data = tl.multiple_of(tl.load(row).to(tl.pointer_type(DTYPE)), ALIGNMENT)
        count = tl.load(row + 1)
        whole = count // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(data + at, (tl.load(data + at).to(WIDE) * factor).to(DTYPE))
        at = whole + tl.arange(0, BLOCK)
        x = tl.load(data + at, mask=at < count, other=0.0)
        tl.store(data + at, (x.to(WIDE) * factor).to(DTYPE), mask=at < count)
