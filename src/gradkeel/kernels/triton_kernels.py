"""What `triton_host` launches: norms of many tensors and of their units, scaling and clamping.

Where a tensor lies is read from ``addresses``, one int64 a tensor, so that it may change between two launches; 0 stands
for a tensor that is not there, whose norm is 0. A tensor is cut into pieces that never change: a row of the table
``pieces`` is the index of its tensor, the byte at which it begins, its number of entries, and the index of its factor
or norm. Sums are float64 whatever the entries are.
"""

import triton
import triton.language as tl


@triton.jit
def _piece(addresses, row, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Where a piece begins, and how many entries it has; none where its tensor is not there."""
    address = tl.load(addresses + tl.load(row))
    data = tl.multiple_of((address + tl.load(row + 1)).to(tl.pointer_type(DTYPE)), ALIGNMENT)
    return data, tl.where(address == 0, 0, tl.load(row + 2))


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
def _sum(data, count, DTYPE: tl.constexpr, IS_SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of ``(|x| / scale)^p`` over a piece, and the scale, which float64 alone needs: 1 for the others."""
    scale = tl.full([], 1.0, dtype=tl.float64)
    if DTYPE == tl.float64:  # noqa: SIM300  # a type, written large as Triton's constants are
        scale = _largest(data, count, BLOCK)
    whole = count // BLOCK * BLOCK
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, whole, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = _magnitudes(data, at, at < count, IS_MASKED=False)
        if DTYPE == tl.float64:  # noqa: SIM300
            x = x / scale
        total += x * x if IS_SQUARED else x
    at = whole + tl.arange(0, BLOCK)
    x = _magnitudes(data, at, at < count, IS_MASKED=True) / scale
    total += x * x if IS_SQUARED else x
    return tl.sum(total, axis=0), scale


@triton.jit(do_not_specialize=["first"])
def sum_powers(
    addresses,
    pieces,
    first,
    sums,
    scales,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    IS_SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For each piece from the first on, ``sums`` and ``scales``: its sum of powers, where float64 needs a scale."""
    piece = first + tl.program_id(0)
    data, count = _piece(addresses, pieces + 4 * piece, DTYPE, ALIGNMENT)
    found, scale = _sum(data, count, DTYPE, IS_SQUARED, BLOCK)
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


@triton.jit(do_not_specialize=["first", "count"])
def unit_norms(
    addresses,
    pieces,
    first,
    count,
    norms,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    IS_SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The norm of each of ``count`` units, every one a piece, ``ROWS`` of them by one program."""
    for i in range(ROWS):
        unit = tl.program_id(0) * ROWS + i
        if unit < count:
            row = pieces + 4 * (first + unit)
            data, size = _piece(addresses, row, DTYPE, ALIGNMENT)
            found, scale = _sum(data, size, DTYPE, IS_SQUARED, BLOCK)
            tl.store(norms + tl.load(row + 3), scale * (tl.sqrt(found) if IS_SQUARED else found))


@triton.jit(do_not_specialize=["first", "stride"])
def scale_pieces(
    addresses,
    pieces,
    first,
    factors,
    stride,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiplies each piece by its factor, in the type ``WIDE``; where that is 1 nothing is touched."""
    row = pieces + 4 * (first + tl.program_id(0))
    factor = tl.load(factors + stride * tl.load(row + 3)).to(WIDE)
    if factor != 1.0:
        data, count = _piece(addresses, row, DTYPE, ALIGNMENT)
        whole = count // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(data + at, (tl.load(data + at).to(WIDE) * factor).to(DTYPE))
        at = whole + tl.arange(0, BLOCK)
        x = tl.load(data + at, mask=at < count, other=0.0)
        tl.store(data + at, (x.to(WIDE) * factor).to(DTYPE), mask=at < count)


@triton.jit(do_not_specialize=["first", "low", "high"])
def clamp_pieces(
    addresses,
    pieces,
    first,
    low,
    high,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Clamps each entry into ``[low, high]``, and writes only those outside; a NaN is on neither side, and stays."""
    data, count = _piece(addresses, pieces + 4 * (first + tl.program_id(0)), DTYPE, ALIGNMENT)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(data + at, mask=at < count, other=0.0).to(tl.float32)
        is_outside = (x < low) | (x > high)
        tl.store(data + at, tl.where(x < low, low, high).to(DTYPE), mask=(at < count) & is_outside)
