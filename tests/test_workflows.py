"""The workflows of .github: every platform is built, tried and published, with no more rights than that takes."""

import re
import sys
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import check_release

NAMES = ("ci", "release")
PLATFORMS = {  # runner -> target of the wheel
    "ubuntu-24.04": "x86_64",
    "ubuntu-24.04-arm": "aarch64",
    "macos-15": "aarch64",  # Apple silicon
    "macos-15-intel": "x86_64",
    "windows-2025": "x64",
}
PYTHONS = {"3.10", "3.14"}


def workflow(name):
    found = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8"))
    found["on"] = found.pop(True)  # YAML 1.1 reads the key `on` as a truth value
    return found


CI, RELEASE = map(workflow, NAMES)
JOBS = [pytest.param(job, id=f"{name}-{key}") for name in NAMES for key, job in workflow(name)["jobs"].items()]


def steps(job):
    return [step for step in job["steps"] if "uses" in step], [step["run"] for step in job["steps"] if "run" in step]


def before(job):
    """Names of the jobs that must have passed before this one starts."""
    direct = RELEASE["jobs"][job].get("needs", [])
    direct = {direct} if isinstance(direct, str) else set(direct)
    return direct.union(*(before(name) for name in direct))


def test_these_are_all_workflows():
    assert {path.stem for path in (ROOT / ".github/workflows").iterdir()} == set(NAMES)


@pytest.mark.parametrize("found", [CI, RELEASE], ids=NAMES)
def test_rights_are_minimal(found):
    assert found["permissions"] == {"contents": "read"}
    extra = {name: job["permissions"] for name, job in found["jobs"].items() if "permissions" in job}
    wanted = {"publish": {"id-token": "write"}, "pages": {"pages": "write", "id-token": "write"}}
    assert extra == (wanted if found is RELEASE else {})
    assert found["concurrency"]["cancel-in-progress"] is (found is CI)
    text = str(found)
    assert "secrets." not in text
    assert "pull_request_target" not in text


@pytest.mark.parametrize("job", JOBS)
def test_every_job_is_bounded_and_pinned(job):
    assert 0 < job["timeout-minutes"] <= 120
    used, commands = steps(job)
    for step in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), "an action is pinned to a commit"
        if step["uses"].startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
    assert not [command for command in commands if "${{" in command], "an expression in a script is an injection"


def test_an_action_has_one_version():
    text = "".join((ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8") for name in NAMES)
    uses = set(re.findall(r"uses: (\S+)@(\S+) # v\d[\d.]*\n", text))
    assert len(uses) == len({action for action, _ in uses})
    assert text.count("uses: ") == len(re.findall(r"uses: \S+@[0-9a-f]{40} # v", text)), "with the version beside it"


@pytest.mark.parametrize("job", JOBS)
def test_what_a_job_runs_is_there(job):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in steps(job)[1]:
        for target in re.findall(r"\bmake ([\w-]+)", command):
            assert re.search(rf"^{target}\b.*:", makefile, re.M), target
        for script in re.findall(r"\S*\bscripts/\S+", command):
            if script.startswith("scripts/"):
                assert (ROOT / script).is_file(), script


def test_tests_run_on_every_system():
    test, windows = CI["jobs"]["test"]["strategy"]["matrix"], CI["jobs"]["windows"]
    assert set(test["runner"]) == {"ubuntu-24.04", "macos-15"}
    assert set(test["python"]) == set(windows["strategy"]["matrix"]["python"]) == PYTHONS
    assert steps(CI["jobs"]["test"])[1][-1] == "make test"
    assert steps(CI["jobs"]["lint"])[1] == ["make lint"]
    # What `make test` does, and the links first.
    commands = steps(windows)[1]
    assert commands[0] == "git config --global core.symlinks true"
    assert "run" in windows["steps"][0]
    made = re.search(r"^test: setup\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1]
    wanted = [line.strip().replace("$(BIN)", ".venv/Scripts") for line in made.splitlines()]
    assert commands[-len(wanted) :] == wanted


def test_every_platform_is_built_and_tried():
    built = {entry["runner"]: entry["target"] for entry in RELEASE["jobs"]["wheels"]["strategy"]["matrix"]["include"]}
    assert built == PLATFORMS
    used = steps(RELEASE["jobs"]["wheels"])[0]
    (maturin,) = [step for step in used if step["uses"].startswith("PyO3/maturin-action@")]
    assert maturin["with"]["manylinux"] == "2014"
    assert {"--release", "--locked"} <= set(maturin["with"]["args"].split())

    install = RELEASE["jobs"]["install"]
    matrix = install["strategy"]["matrix"]
    assert set(matrix["runner"]) == set(PLATFORMS)
    assert set(matrix["python"]) == PYTHONS
    (command,) = steps(install)[1]
    assert re.search(r"pip install --only-binary :all: dist/\*\.whl$", command, re.M), "the wheel and no extra"
    for job in ("sdist", "install", "train"):
        assert "scripts/smoke.py" in steps(RELEASE["jobs"][job])[1][-1]
    assert "smoke.py --train" in steps(RELEASE["jobs"]["train"])[1][-1]


def test_classifiers_are_what_is_tested():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    versions = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    assert {versions[0], versions[-1]} == PYTHONS
    assert f'requires-python = ">={versions[0]}"' in text
    # One wheel for all of them.
    assert "abi3-py310" in (ROOT / "rust/py/Cargo.toml").read_text(encoding="utf-8")


def test_nothing_is_published_untried():
    assert RELEASE["on"]["push"] == {"tags": ["v*"]}
    publish = RELEASE["jobs"]["publish"]
    assert before("publish") >= {"version", "wheels", "sdist", "install", "train"}
    assert publish["if"] == "github.event_name == 'push' && github.ref_type == 'tag'"
    assert publish["environment"] == "pypi"
    download, upload = steps(publish)[0]
    assert upload["uses"].startswith("pypa/gh-action-pypi-publish@")
    assert "with" not in upload, "trusted publishing takes no password"
    # What it uploads is what the jobs before it made, and not the site, which is an artifact too.
    names = [
        step["with"]["name"]
        for job in ("wheels", "sdist")
        for step in steps(RELEASE["jobs"][job])[0]
        if step["uses"].startswith("actions/upload-artifact@")
    ]
    assert len(names) == 2
    assert all(name.startswith("dist-") for name in names)
    assert download["with"]["pattern"] == "dist-*"
    assert "publish" in before("pages")
    assert "check_release.py" in steps(RELEASE["jobs"]["version"])[1][0]
    assert not any("cache" in str(job).lower() for job in RELEASE["jobs"].values()), "a cache can be filled elsewhere"


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "Cargo.toml").write_text('[workspace.package]\nversion = "0.2.0"\nrust-version = "1.89"\n')
    (tmp_path / "Cargo.lock").write_text('[[package]]\nname = "lewm-core"\nversion = "0.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-12-01\n\n## 0.1.0\n")
    return tmp_path


def test_a_tag_that_fits(checkout):
    assert check_release.problem("v0.2.0", checkout) == ""


@pytest.mark.parametrize(
    ("tag", "file", "text", "message"),
    [
        ("v0.3.0", None, "", "the tag is v0.3.0, and Cargo.toml says 0.2.0: want the tag v0.2.0"),
        ("0.2.0", None, "", "want the tag v0.2.0"),
        ("v0.2.0", "CHANGELOG.md", "## [Unreleased]\n\n## [0.2.01]\n", "CHANGELOG.md has no section 0.2.0"),
        ("v0.2.0", "Cargo.lock", 'name = "lewm-core"\nversion = "0.1.0"\n', "run `cargo update --workspace`"),
        ("v0.2.0", "Cargo.toml", "", "Cargo.toml names no version"),
    ],
)
def test_a_tag_that_does_not_fit(checkout, tag, file, text, message):
    if file:
        (checkout / file).write_text(text)
    assert message in check_release.problem(tag, checkout)
