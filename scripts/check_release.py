"""Whether a tag names the version that this checkout builds, and the changelog says what is in it.

python scripts/check_release.py v0.2.0
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def problem(tag: str, root: Path = ROOT) -> str:
    """What is wrong with releasing this checkout under `tag`, "" if nothing is."""
    found = re.search(r'^version = "(.+)"', (root / "Cargo.toml").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        return "Cargo.toml names no version"
    version = found[1]
    if tag != f"v{version}":
        return f"the tag is {tag}, and Cargo.toml says {version}: want the tag v{version}"
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[?{re.escape(version)}\]?( |$)", changes, re.MULTILINE):
        return f"CHANGELOG.md has no section {version}"
    lock = (root / "Cargo.lock").read_text(encoding="utf-8")
    if f'name = "lewm-core"\nversion = "{version}"\n' not in lock:
        return f"Cargo.lock is not that of {version}: run `cargo update --workspace`"
    return ""


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/check_release.py TAG")
    sys.exit(problem(sys.argv[1]) or None)
