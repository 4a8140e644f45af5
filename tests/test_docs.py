"""The documentation site builds strictly without a network, and every block of every page runs."""

import os
import re
import subprocess
import sys

import pytest

for library in ("torch", "matplotlib", "mkdocstrings", "h5py", "pyarrow", "av", "onnxruntime"):
    pytest.importorskip(library)
griffe = pytest.importorskip("griffe")

import lewm
from blocks import ROOT, Block, blocks, command, cut_short, hub_with_a_model, leave_the_tutorials_model, run

DOCS = ROOT / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "```" in page.read_text(encoding="utf-8")]

REFERENCE = "".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md")))
OWN_ROBOT = DOCS / "own-robot.md"
# What a page does often, and how often it does so here.
FEWER = {
    "own-robot.md": {
        "range(200)": "range(6)",
        "steps=600": "steps=12",
        "trials = 0, 0, 100": "trials = 0, 0, 2",
        "range(50)": "range(30)",
    }
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built(site):
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS).with_suffix(".html")).is_file()


def test_the_site_needs_no_network(site):
    # A link (<a href>) may lead anywhere; what a browser loads by itself is in the site.
    loaded = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc="?(https?:)?//|<link\b[^>]*\bhref="?https?://""")
    for page in site.rglob("*.html"):
        assert not loaded.search(page.read_text(encoding="utf-8")), page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


def test_every_public_name_is_in_the_reference(site):
    known = set(re.findall(r"^::: lewm\.(\w+)$|`lewm\.([A-Z]+)`", REFERENCE, re.M))
    assert {name for pair in known for name in pair if name} >= set(lewm.__all__) - {"__version__"}
    for name in re.findall(r"^::: (\S+)$", REFERENCE, re.M):
        assert any(f'id="{name}"' in page.read_text(encoding="utf-8") for page in (site / "reference").iterdir()), name


def test_docstrings_name_the_parameters_that_there_are():
    # griffe's own check is off in mkdocs.yml: it does not know that one entry may describe several.
    package = griffe.load("lewm", search_paths=[ROOT / "python"], allow_inspection=False, resolve_aliases=True)
    documented = [package[name] for name in re.findall(r"^::: lewm\.(\S+)$", REFERENCE, re.M)]
    methods = [member for item in documented if item.is_class for member in item.members.values()]
    checked = 0
    for item in [*documented, *(method for method in methods if method.is_function)]:
        made = next((item.members[name] for name in ("__init__", "__new__") if name in item.members), None)
        known = set(item.all_members) if item.is_class else set()  # of a dataclass, its fields
        known |= {parameter.name for parameter in getattr(item if made is None else made, "parameters", [])}
        for section in item.docstring.parse("google") if item.docstring else []:
            if section.kind is griffe.DocstringSectionKind.parameters:
                names = {name.lstrip("*") for entry in section.value for name in entry.name.split(", ")}
                assert names <= known, (item.path, names - known)
                checked += len(names)
    assert checked > 200


@pytest.fixture
def run_page(monkeypatch, tmp_path):
    """Runs all blocks of a page, and gives what its Python leaves behind."""
    cut_short(monkeypatch, tmp_path)
    hub = hub_with_a_model(monkeypatch, tmp_path)

    def runs(page):
        text, found, fewer = page.read_text(encoding="utf-8"), blocks(page), FEWER.get(page.name, {})
        assert all(often in text for often in fewer), "the page has changed, and FEWER has not"
        if "runs/two-room/model.safetensors" in text and page.name != "tutorial.md":
            leave_the_tutorials_model(tmp_path)
        scope = {"__name__": "__main__"}
        for block in found:
            for often, seldom in fewer.items():
                block = block._replace(code=block.code.replace(often, seldom))
            run(block, page, scope)
        return scope

    yield runs
    hub.close()


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(DOCS).as_posix() for page in PAGES])
def test_blocks(page, run_page, capsys):
    scope = run_page(page)
    if page == OWN_ROBOT:
        assert re.search(r"holding: the newest picture of camera, number \d+, is \d+ ms old", capsys.readouterr().out)
        assert scope["data"].lengths.tolist() == [101] * 6
        assert scope["model"].stats["high"].tolist() == [1.2, 0.6]
        assert scope["executed"].shape == (2,)  # the camera came back


def test_the_page_about_a_robot_is_the_example():
    text = (ROOT / "examples/own_robot.py").read_text(encoding="utf-8")
    example = text[text.index("import time") :].splitlines()
    page = [line for block in blocks(OWN_ROBOT) if block.language == "python" for line in block.code.splitlines()]
    assert list(filter(None, page)) == list(filter(None, example))


def test_a_language_that_does_not_run_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```text\nread\n```\n\n```ruby\nputs 1\n```\n")
    with pytest.raises(AssertionError, match=r"page.md:5: 'ruby'"):
        blocks(page)
    page.write_text("- in a list\n  ```python\n  x = 1\n  ```\n")
    with pytest.raises(AssertionError, match="not at the start of its line"):
        blocks(page)


def test_blocks_that_need_other_libraries_are_compiled(tmp_path):
    scope = {}
    run(Block("python peers", "import no_such_library\n", 3), tmp_path / "page.md", scope)
    assert scope == {}
    with pytest.raises(SyntaxError):
        run(Block("python lerobot", "import\n", 3), tmp_path / "page.md", scope)


def test_a_failing_block_says_where(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\ny = x / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run(blocks(page)[0], page, {})
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno + 1) == (page, 5)
    for line in ("rm -rf runs", "python -m http.server", "pip install lewm-fast[nothing]", "python no/such/file.py"):
        with pytest.raises(AssertionError):
            command(line)
