"""Checks of plain arguments. What a user got wrong is named: the argument, what it wants, and what it got."""

from __future__ import annotations

from operator import index
from typing import Any


def integer(name: str, value: Any, low: int | None = None, end: int | None = None) -> int:
    """`value` as an int within [low, end).

    Raises:
        TypeError: It is not an integer.
        ValueError: It is not within [low, end).
    """
    wish = f"{name} must be an integer"
    wish += "" if low is None else f" of at least {low}"
    wish += "" if end is None else f" and below {end}"
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{wish}, got {value!r}") from None
    if (low is not None and number < low) or (end is not None and number >= end):
        raise ValueError(f"{wish}, got {value}")
    return number
