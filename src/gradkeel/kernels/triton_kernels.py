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
def _largest(data, count, BLOCK: tl.constexpr):
    """The largest magnitude of a piece, or 1 where that is 0 or not finite."""
    most = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.abs(tl.load(data + at, mask=at < count, other=0.0).to(tl.float64)))
    largest = tl.max(most, axis=0)
    return tl.where((largest > 0) & (largest < float("inf")), largest, 1.0)


@triton.jit
def _read(
    data,
    count,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    IS_SQUARED: tl.constexpr,
    HAS_PEAKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One read of a piece: the sum of ``(|x| / scale)^p``, the scale, and the lowest and highest entry where wanted.

    The scale is 1 but for float64, which alone needs one. Extremes are NaN where an entry is, inf and -inf of nothing.
    """
    scale = tl.full([], 1.0, dtype=tl.float64)
    if DTYPE == tl.float64:  # noqa: SIM300  # a type, written large as Triton's constants are
        scale = _largest(data, count, BLOCK)
    whole = count // BLOCK * BLOCK
    total = tl.zeros([BLOCK], dtype=tl.float64)
    # Compared in float32 where that holds every entry, for float64 is slow.
    low, high = tl.full([BLOCK], float("inf"), WIDE), tl.full([BLOCK], float("-inf"), WIDE)
    strange = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, whole, BLOCK):
        entries = tl.load(data + start + tl.arange(0, BLOCK))
        if HAS_PEAKS:
            y = entries.to(WIDE)
            low, high = tl.minimum(low, y), tl.maximum(high, y)
            strange = strange | (y != y).to(tl.int32)
        x = tl.abs(entries.to(tl.float64))
        if DTYPE == tl.float64:  # noqa: SIM300
            x = x / scale
        total += x * x if IS_SQUARED else x
    at = whole + tl.arange(0, BLOCK)
    entries = tl.load(data + at, mask=at < count, other=0.0)
    if HAS_PEAKS:
        y = entries.to(WIDE)
        low = tl.where(at < count, tl.minimum(low, y), low)
        high = tl.where(at < count, tl.maximum(high, y), high)
        strange = strange | (y != y).to(tl.int32)
    x = tl.abs(entries.to(tl.float64)) / scale
    total += x * x if IS_SQUARED else x
    is_strange = tl.max(strange, axis=0) > 0
    lowest, highest = tl.min(low, axis=0).to(tl.float64), tl.max(high, axis=0).to(tl.float64)
    lowest = tl.where(is_strange, float("nan"), lowest)
    return tl.sum(total, axis=0), scale, lowest, tl.where(is_strange, float("nan"), highest)


@triton.jit(do_not_specialize=["first", "count"])
def read_pieces(
    addresses,
    pieces,
    first,
    count,
    sums,
    scales,
    peaks,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    IS_SQUARED: tl.constexpr,
    HAS_PEAKS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """For ``count`` pieces from the first on, ``ROWS`` by one program: sum of powers, its scale, and extremes."""
    for i in range(ROWS):
        own = tl.program_id(0) * ROWS + i
        if own < count:
            piece = first + own
            data, size = _piece(addresses, pieces + 4 * piece, DTYPE, ALIGNMENT)
            found, scale, low, high = _read(data, size, DTYPE, WIDE, IS_SQUARED, HAS_PEAKS, BLOCK)
            tl.store(sums + piece, found)
            # A piece of zeros must not keep the scale of the whole from being as small as the other pieces need it.
            tl.store(scales + piece, tl.where(found == 0, 0.0, scale))
            if HAS_PEAKS:
                tl.store(peaks + 2 * piece, low)
                tl.store(peaks + 2 * piece + 1, high)


@triton.jit
def join_powers(
    sums, scales, spans, norms, HAS_SCALES: tl.constexpr, IS_SQUARED: tl.constexpr, BLOCK: tl.constexpr
):
    """The norm of each tensor from its pieces, which are those from the span's first on, as many as it says."""
    tensor = tl.program_id(0)
    first = tl.load(spans + 2 * tensor)
    count = tl.load(spans + 2 * tensor + 1)
    scale = tl.full([], 1.0, dtype=tl.float64)
    if HAS_SCALES:
        most = tl.zeros([BLOCK], dtype=tl.float64)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            most = tl.maximum(most, tl.load(scales + first + at, mask=at < count, other=0.0))
        largest = tl.max(most, axis=0)
        scale = tl.where(largest > 0, largest, 1.0)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        powers = tl.load(sums + first + at, mask=at < count, other=0.0)
        if HAS_SCALES:
            share = tl.load(scales + first + at, mask=at < count, other=0.0) / scale
            powers = powers * (share * share if IS_SQUARED else share)
        total += powers
    found = tl.sum(total, axis=0)
    tl.store(norms + tensor, scale * (tl.sqrt(found) if IS_SQUARED else found))


@triton.jit(do_not_specialize=["count"])
def unit_norms(pieces, count, sums, scales, norms, IS_SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    """The norm of each unit, where every unit is one piece."""
    piece = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_one = piece < count
    found = tl.load(sums + piece, mask=is_one, other=0.0)
    scale = tl.load(scales + piece, mask=is_one, other=0.0)
    unit = tl.load(pieces + 4 * piece + 3, mask=is_one, other=0)
    tl.store(norms + unit, scale * (tl.sqrt(found) if IS_SQUARED else found), mask=is_one)


@triton.jit(do_not_specialize=["count"])
def join_norms(norms, count, total, IS_SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    """The norm of all tensors together, relative to the largest one, so that no power leaves the range."""
    most, strange = tl.zeros([BLOCK], dtype=tl.float64), tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(norms + at, mask=at < count, other=0.0)
        strange = strange | (x != x).to(tl.int32)
        most = tl.maximum(most, x)
    largest = tl.max(most, axis=0)
    scale = tl.where((largest > 0) & (largest < float("inf")), largest, 1.0)
    found = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(norms + at, mask=at < count, other=0.0) / scale
        found += x * x if IS_SQUARED else x
    whole = tl.sum(found, axis=0)
    whole = scale * (tl.sqrt(whole) if IS_SQUARED else whole)
    tl.store(total, tl.where(tl.max(strange, axis=0) > 0, float("nan"), whole))


@triton.jit
def join_peaks(found, spans, peaks, BLOCK: tl.constexpr):
    """The extremes of each tensor from its pieces'; 0 and 0 of nothing."""
    tensor = tl.program_id(0)
    first = tl.load(spans + 2 * tensor)
    count = tl.load(spans + 2 * tensor + 1)
    low, high = tl.full([BLOCK], float("inf"), tl.float64), tl.full([BLOCK], float("-inf"), tl.float64)
    strange = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        least = tl.load(found + 2 * (first + at), mask=at < count, other=float("inf"))
        most = tl.load(found + 2 * (first + at) + 1, mask=at < count, other=float("-inf"))
        strange = strange | (least != least).to(tl.int32)
        low, high = tl.minimum(low, least), tl.maximum(high, most)
    lowest, highest = tl.min(low, axis=0), tl.max(high, axis=0)
    is_nothing = lowest > highest
    is_strange = tl.max(strange, axis=0) > 0
    lowest, highest = tl.where(is_nothing, 0.0, lowest), tl.where(is_nothing, 0.0, highest)
    tl.store(peaks + 2 * tensor, tl.where(is_strange, float("nan"), lowest))
    tl.store(peaks + 2 * tensor + 1, tl.where(is_strange, float("nan"), highest))


@triton.jit(do_not_specialize=["first", "count", "stride"])
def scale_pieces(
    addresses,
    pieces,
    first,
    count,
    factors,
    stride,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Multiplies ``count`` pieces from the first on, ``ROWS`` by one program, each by its factor, in the type ``WIDE``.

    Where that is 1 nothing is touched.
    """
    for i in range(ROWS):
        own = tl.program_id(0) * ROWS + i
        if own < count:
            row = pieces + 4 * (first + own)
            exact = tl.load(factors + stride * tl.load(row + 3))
            # Below the normal numbers of float32 a factor is applied in two multiplications, of which one is exact.
            is_tiny = tl.abs(exact) < 1.1754943508222875e-38
            factor = tl.where(is_tiny, exact * 1.8446744073709552e19, exact).to(WIDE)
            rest = tl.where(is_tiny, 5.421010862427522e-20, 1.0).to(WIDE)
            if exact != 1.0:
                data, size = _piece(addresses, row, DTYPE, ALIGNMENT)
                whole = size // BLOCK * BLOCK
                for start in range(0, whole, BLOCK):
                    at = start + tl.arange(0, BLOCK)
                    tl.store(data + at, (tl.load(data + at).to(WIDE) * factor * rest).to(DTYPE))
                at = whole + tl.arange(0, BLOCK)
                x = tl.load(data + at, mask=at < size, other=0.0)
                tl.store(data + at, (x.to(WIDE) * factor * rest).to(DTYPE), mask=at < size)


@triton.jit(do_not_specialize=["first", "low", "high"])
def clamp_pieces(
    addresses,
    pieces,
    first,
    peaks,
    low,
    high,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    HAS_PEAKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Clamps each entry into ``[low, high]``, and writes only those outside; a NaN is on neither side, and stays.

    With ``peaks`` a tensor whose extremes are within is not read.
    """
    row = pieces + 4 * (first + tl.program_id(0))
    is_within = False
    if HAS_PEAKS:
        tensor = tl.load(row + 3)
        is_within = (tl.load(peaks + 2 * tensor) >= low) & (tl.load(peaks + 2 * tensor + 1) <= high)
    if not is_within:  # of NaN neither comparison holds
        data, count = _piece(addresses, row, DTYPE, ALIGNMENT)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(data + at, mask=at < count, other=0.0).to(tl.float32)
            is_outside = (x < low) | (x > high)
            tl.store(data + at, tl.where(x < low, low, high).to(DTYPE), mask=(at < count) & is_outside)
