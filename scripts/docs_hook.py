"""MkDocs hook: files of the repository become pages of the site, and links between them hold.

Pages link to each other as the repository has them, so that they read well there too. A link to a file that is no page
leads to a copy of it in the site: a build needs no address of the repository, and no network.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent

# File of the repository -> page of the site.
PAGES = {
    "README.md": "readme.md",
    "RESULTS.md": "results.md",
    "benches/README.md": "benchmarks.md",
    "kernels/README.md": "kernels.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_WIDE = ("results.md", "benchmarks.md")  # their tables need the room
_COPIES = "files"
_LINK = re.compile(r"(!?\[[^\]\n]*\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of `PAGES`."""
    for source, page in PAGES.items():
        head = "---\nhide: [navigation, toc]\n---\n" if page in _WIDE else ""
        files.append(File.generated(config, page, content=head + (ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Points every relative link at what the site has of its target."""
    of_page = {name: source for source, name in PAGES.items()}
    here = of_page.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(match: re.Match[str]) -> str:
        start, target, anchor, end = match.groups("")
        if re.match(r"[a-z]+:|/", target):
            return match[0]
        source = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        return start + _relative(_page_of(source, config, files), page.file.src_uri) + anchor + end

    # Code keeps its brackets.
    parts, at = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_LINK.sub(moved, markdown[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, _LINK.sub(moved, markdown[at:])])


def _page_of(source: str, config: Any, files: Files) -> str:
    """What the site calls a file of the repository; one that is no page is copied. mkdocs reports what is not there."""
    if source in PAGES:
        return PAGES[source]
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    copy = f"{_COPIES}/{source}"
    if (ROOT / source).is_file() and files.get_file_from_path(copy) is None:
        files.append(File.generated(config, copy, abs_src_path=str(ROOT / source)))
    return copy


def _relative(target: str, page: str) -> str:
    return posixpath.relpath(target, posixpath.dirname(page) or ".")
