"""The tables of systems into the page that has places for them.

    python -m benches.systems

A place names a file of `benches/results`, which is the `systems.json` of a run of `lewm bench systems`.
"""

from __future__ import annotations

import re
from pathlib import Path

from lewm.model_file import write_atomically
from lewm.systems import SystemsTable

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benches" / "results"
PAGE = ROOT / "docs" / "systems.md"
PLACE = re.compile(r"(<!-- systems: (\S+) -->\n)(.*?)(<!-- /systems -->)", re.S)


def tables(page: str) -> str:
    """A page with the tables in their places."""
    return PLACE.sub(lambda found: f"{found[1]}{SystemsTable.load(RESULTS / found[2])}{found[4]}", page)


if __name__ == "__main__":
    write_atomically(PAGE, tables(PAGE.read_text(encoding="utf-8")).encode())
