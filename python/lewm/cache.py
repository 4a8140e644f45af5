"""What was found out about this machine, kept in the user's cache folder."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from lewm.model_file import write_atomically


def remembered(file: str, key: str, find: Callable[[], bool | None]) -> bool | None:
    """The answer kept under `key` in `file` of the cache folder, else that of `find`, kept unless it is None."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lewm-fast" / file
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    if isinstance(known.get(key), bool):
        return known[key]
    answer = find()
    if answer is not None:
        known[key] = answer
        with contextlib.suppress(OSError):  # nowhere to remember it
            write_atomically(path, json.dumps(known).encode())
    return answer
