"""Results kept as JSON, read back with every type checked: a file may be from anywhere."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lewm.model_file import brief

T = TypeVar("T")
LARGEST = 2**24  # bytes; of a result of lewm evaluate some 100,000 pairs


def read_record(path: str | os.PathLike[str], what: str, kind: str, parse: Callable[[Any], T]) -> T:
    """What `parse` makes of the JSON in a file.

    Args:
        path: The file.
        what: What error messages call it, as "result".
        kind: What it should be, as "result of lewm evaluate".
        parse: From plain data; what it raises about them becomes a ValueError that names the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is too large, no JSON, or `parse` refuses it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{what}: no such file: {path}")
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ValueError(f"it is larger than {LARGEST} bytes")
        return parse(json.loads(text))
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{what}: {path} is no {kind} ({brief(error)})") from None


def typed(name: str, value: Any, kind: Any) -> Any:
    """A value from JSON as what an annotation says: plain types, lists, tuples, dicts, dataclasses, `T | None`."""
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any and len(repr(value)) < 1000:  # a setting
        return value
    if origin is types.UnionType:
        return None if value is None else typed(name, value, of[0])
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind in (bool, int, str) and type(value) is kind:
        return value
    if origin is list and isinstance(value, list):
        return [typed(name, each, of[0]) for each in value]
    if origin is tuple and isinstance(value, list) and len(value) == len(of):
        return tuple(typed(name, each, one) for each, one in zip(value, of, strict=True))
    if origin is dict and isinstance(value, dict):
        return {key: typed(f"{name}[{key!r}]", each, of[1]) for key, each in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        kinds = typing.get_type_hints(kind)
        # What has a default may be missing: older releases did not write it.
        value = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING} | value
        if value.keys() != kinds.keys():
            raise ValueError(f"{name} must have the fields {', '.join(kinds)}, got {', '.join(value)}")
        return kind(**{key: typed(key, each, kinds[key]) for key, each in value.items()})
    raise ValueError(f"{name} must be {kind if of else kind.__name__}, got {value!r}")
