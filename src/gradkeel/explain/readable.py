"""Numbers as people read them."""

import math


def readable(value: float, digits: int = 3) -> str:
    """So many significant digits, without an exponent from 0.0001 up to a billion: 5,180 rather than 5.18e+03."""
    short = float(f"{value:.{digits}g}")
    if not math.isfinite(value) or not 1000 <= abs(short) < 1e9:
        return f"{value:.{digits}g}"
    return f"{short:,.0f}"
