"""The package as an artefact: what wheel and sdist hold, what a clean environment does with them, and the set-up."""

import importlib.util
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from email import message_from_string
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted(path.relative_to(ROOT / "kernels").as_posix() for path in (ROOT / "kernels").rglob("*.py"))
BIN = "Scripts" if sys.platform == "win32" else "bin"
CARGO_VERSION = re.search(r'^version = "(.+)"', (ROOT / "Cargo.toml").read_text(), re.M)[1]


def run(*command, check=True, **kwargs):
    """Runs a command without this process's PYTHONPATH; a failure shows everything it printed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | kwargs.pop("env", {})
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env, **kwargs)
    assert not check or done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def make_environment(folder):
    """Makes a virtual environment with nothing but pip in it and returns its Python."""
    venv.create(folder, with_pip=True)
    return folder / BIN / "python"


def test_kernels_is_a_real_folder_and_a_link_to_it():
    link = ROOT / "python/lewm/kernels"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "kernels"
    # With an __init__.py the folder would hide another project's `kernels` from anything run in the checkout.
    assert not (ROOT / "kernels/__init__.py").exists()
    assert "sigreg.py" in KERNELS


def test_one_version():
    from lewm import _core

    assert version("lewm-fast") == _core.__version__ == CARGO_VERSION


def test_import_takes_neither_torch_nor_triton_and_little_time(tmp_path):
    loaded = run(sys.executable, "-c", "import sys, lewm; print({'torch', 'triton'} & set(sys.modules))", cwd=tmp_path)
    assert loaded.stdout.strip() == "set()"

    seconds = []
    for _ in range(5):
        log = run(sys.executable, "-X", "importtime", "-c", "import lewm", cwd=tmp_path).stderr
        seconds.append(
            int(re.search(r"\| +(\d+) \| lewm$", log, re.M)[1]) / 1e6
        )  # the column "cumulative", microseconds
    assert statistics.median(seconds) < 0.3, seconds


# Artefacts: built once, from the checkout and from the unpacked sdist.


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        "-m",
        "maturin",
        "build",
        "--release",
        "--interpreter",
        sys.executable,
        "--out",
        folder,
        cwd=ROOT,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    """The unpacked sdist. It builds in its own target folder: cargo judges by time, and an sdist's times are fixed."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "maturin", "sdist", "--out", folder, cwd=ROOT)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return next(folder.glob("lewm_fast-*/"))


@pytest.fixture(scope="session")
def clean_environment(tmp_path_factory, wheel):
    """The Python of an environment that holds the wheel and what `pip install lewm-fast` brings, and no torch."""
    python = make_environment(tmp_path_factory.mktemp("clean") / "env")
    run(python, "-m", "pip", "install", "-q", wheel)
    return python


@pytest.mark.slow
def test_wheel_listing(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert re.fullmatch(rf"lewm_fast-{re.escape(CARGO_VERSION)}-cp310-abi3-\w+\.whl", wheel.name)
    modules = {path.relative_to(ROOT / "python").as_posix() for path in (ROOT / "python").rglob("*.py")}
    kernels = {f"lewm/kernels/{name}" for name in KERNELS}
    native = {name for name in names if name.startswith("lewm/_core.abi3.")}
    assert len(native) == 1
    assert wheel.stat().st_size < 5 << 20  # 1.2 MB in 0.1.0: nothing large has slipped in
    package = {name for name in names if ".dist-info/" not in name and ".libs/" not in name}
    assets = {f"lewm/envs/assets/{name}" for name in ("LICENSE", "reacher.xml")}
    assert package == modules | kernels | native | assets | {"lewm/py.typed", "lewm/_core.pyi"}


@pytest.mark.slow
def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        folder = f"lewm_fast-{CARGO_VERSION}.dist-info"
        found = message_from_string(archive.read(f"{folder}/METADATA").decode())
        assert archive.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert found["Requires-Python"] == ">=3.10"
    assert found["License-Expression"] == "MIT"
    assert found.get_all("License-File") == ["LICENSE"]
    assert found["Description-Content-Type"].startswith("text/markdown")
    assert found.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert "Typing :: Typed" in found.get_all("Classifier")
    base = {Requirement(line).name for line in found.get_all("Requires-Dist") if "extra ==" not in line}
    assert base == {"numpy", "gymnasium", "typer", "rich", "safetensors"}


@pytest.mark.slow
def test_sdist_listing(sdist):
    assert {path.name for path in sdist.iterdir()} == {
        *("Cargo.toml", "Cargo.lock", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO", "python", "rust")
    }
    assert next(sdist.parent.glob("*.tar.gz")).stat().st_size < 1 << 20  # 0.4 MB in 0.1.0
    names = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if not path.is_dir()}
    wanted = {f"python/lewm/kernels/{name}" for name in KERNELS}
    wanted |= {"Cargo.toml", "Cargo.lock", "pyproject.toml", "README.md", "LICENSE", "rust/py/build.rs"}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rust").rglob("*.rs")}
    wanted |= {name for name in sources if not name.startswith("rust/core/fuzz/")}  # for a clone: it builds nothing
    assert wanted <= names
    assert not any((sdist / "python/lewm/kernels" / name).is_symlink() for name in KERNELS)
    assert not {name for name in names if name.endswith((".so", ".pyc"))}


@pytest.mark.slow
def test_from_nothing_to_a_plan_within_a_minute(wheel, tmp_path):
    """Environment, installation, model file, plan. The downloads are pip's, from its cache where it has one."""
    start = time.perf_counter()
    python = make_environment(tmp_path / "env")
    run(python, "-m", "pip", "install", "-q", wheel)
    said = run(python, ROOT / "scripts/smoke.py", cwd=tmp_path).stdout
    seconds = time.perf_counter() - start
    assert "planned on cpu" in said
    assert seconds < 60, said


CLEAN_IMPORT = """
import importlib.util, sys
assert importlib.util.find_spec("torch") is None
import lewm
import gymnasium
assert "lewm/TwoRoom-v0" in gymnasium.registry
print(lewm.__file__)
"""
KERNEL_IMPORT = """
import importlib, sys
sys.path.append(sys.argv[1])  # last, so that only what is missing here comes from there
for name in sys.argv[2:]:
    print(importlib.import_module(name).__file__)
"""


PLAN_WITHOUT_TORCH = """
import sys
import numpy as np
import lewm
from lewm.envs.two_room import frame

for path in sys.argv[1:]:
    model = lewm.load(path)
    assert model.backend == "cpu"
    obs, goal = (frame(point, size=model.config.image_size) for point in ([60, 60], [150, 90]))
    planner = lewm.CEM(samples=20, iterations=2, elites=4, horizon=2)
    low, high = model.stats["low"], model.stats["high"]
    for kind in (planner, lewm.ICEM(samples=20, iterations=2, elites=4, horizon=2), None):
        if kind is None and model.config.image_size > 100:
            continue  # a plan of the paper's size takes seconds
        plan = lewm.plan(obs, goal, model=model, planner=kind)
        assert plan.backend == "cpu" and (low <= plan.actions).all() and (plan.actions <= high).all()
    controller = lewm.Controller(model, goal, planner=planner, execute=1)
    actions = [controller(obs) for _ in range(2 * model.config.action_block)]
    assert np.isfinite(actions).all()
    np.testing.assert_allclose(model.encode(obs), np.load(path + ".npy"), atol=1e-4)
assert "torch" not in sys.modules and "triton" not in sys.modules
print("planned", len(sys.argv) - 1)
"""


@pytest.mark.slow
def test_planning_without_torch(clean_environment, tmp_path):
    """`pip install lewm-fast` alone plans from the model file; the answers are those of PyTorch here."""
    torch = pytest.importorskip("torch")
    import lewm
    from lewm.config import configure
    from lewm.envs.two_room import frame
    from lewm.network import LeWM

    stats = {"mean": [0.0, 0.1], "std": [0.5, 0.6], "low": [-1, -1], "high": [1, 1]}
    for preset in ("tiny", "small", "paper"):
        torch.manual_seed(0)
        config, _ = configure(preset, 2, {})
        network = LeWM(config)
        meta = {"preset": preset, "planner": {"samples": 30, "iterations": 3, "elites": 5, "horizon": 3}}
        model = lewm.Model(config, network.state_dict(), stats=stats, meta=meta, backend="torch")
        model.save(tmp_path / f"{preset}.safetensors")
        np.save(tmp_path / f"{preset}.safetensors.npy", model.encode(frame([60, 60], size=config.image_size)))
    files = sorted(map(str, tmp_path.glob("*.safetensors")))
    assert run(clean_environment, "-c", PLAN_WITHOUT_TORCH, *files, cwd=tmp_path).stdout.strip() == "planned 3"


@pytest.mark.slow
@pytest.mark.parametrize("artefact", ["wheel", "sdist"])
def test_clean_install(artefact, request, clean_environment, tmp_path):
    source = request.getfixturevalue(artefact)
    run(clean_environment, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", source)
    home = clean_environment.parent.parent

    where = run(clean_environment, "-c", CLEAN_IMPORT, cwd=tmp_path).stdout.strip()
    assert Path(where).is_relative_to(home)
    usage = run(home / BIN / "lewm", "--help", cwd=tmp_path, env={"COLUMNS": "120", "NO_COLOR": "1"}).stdout
    assert "demo" in usage
    assert "train" in usage

    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton on this system: the kernels cannot be imported")
    torch_home = Path(importlib.util.find_spec("torch").origin).parent.parent
    modules = ["lewm.kernels." + name.removesuffix(".py").replace("/", ".") for name in KERNELS]
    files = run(clean_environment, "-c", KERNEL_IMPORT, torch_home, *modules, cwd=tmp_path).stdout.split()
    assert len(files) == len(KERNELS)
    assert all(Path(file).is_relative_to(home) for file in files)


@pytest.mark.slow
def test_a_lost_link_stops_the_build(sdist, tmp_path):
    """A checkout without symbolic links has a text file in the link's place."""
    broken = tmp_path / "checkout"
    shutil.copytree(sdist, broken, ignore=shutil.ignore_patterns("target"))
    shutil.rmtree(broken / "python/lewm/kernels")
    (broken / "python/lewm/kernels").write_text("../../kernels")
    # check instead of build: the guard runs all the same, and the dependencies are not compiled to machine code.
    # In a folder of its own: one that the environment names may know the guard's answer for another checkout.
    done = run("cargo", "check", "--locked", "-p", "lewm-py", "--target-dir", "target", cwd=broken, check=False)
    assert done.returncode != 0
    assert "this checkout lost its symbolic links" in done.stderr


# The set-up: what it says before it downloads anything, and that it leaves torch alone.


@pytest.fixture
def bare_machine(tmp_path):
    """Runs scripts/setup.sh where only the given commands exist; returns what it wrote to stderr, by line."""

    def setup(python=f'exec {sys.executable} "$@"', **commands):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in ("sh", "dirname", "sed", "cut", "sort", "head"):
            (folder / name).symlink_to(shutil.which(name))
        for name, body in {"python3": python, "uname": "echo Linux", **commands}.items():
            (folder / name.replace("_", "-")).write_text(f"#!/bin/sh\n{body}\n")
            (folder / name.replace("_", "-")).chmod(0o755)
        env = {"PATH": str(folder), "VENV": str(tmp_path / "env"), "PYTHON": "python3"}
        done = run("sh", ROOT / "scripts/setup.sh", env=env, check=False)
        assert done.returncode == 1
        assert done.stdout == ""
        assert not (tmp_path / "env").exists()
        return done.stderr.splitlines()

    return setup


NO_SHELL = pytest.mark.skipif(sys.platform == "win32", reason="Windows is set up without scripts/setup.sh")
CARGO, CC = 'echo "cargo 1.95.0 (f2d3ce0bd 2026-03-21)"', "exit 0"


@NO_SHELL
@pytest.mark.parametrize(
    ("commands", "parts"),
    [
        pytest.param({"cc": CC, "apt_get": ""}, ("Rust 1.89", "no cargo", "rustup.rs"), id="no-cargo"),
        pytest.param({"cc": CC, "cargo": 'echo "cargo 1.63.0"'}, ("Rust 1.89", "1.63.0 found"), id="old-cargo"),
        pytest.param({"cc": CC, "cargo": "exit 1", "rustup": ""}, ("no cargo", "rustup default"), id="no-toolchain"),
        pytest.param({"cargo": CARGO, "apt_get": ""}, ("C compiler", "apt install build-essential"), id="no-cc-debian"),
        pytest.param({"cargo": CARGO, "uname": "echo Darwin"}, ("C compiler", "xcode-select"), id="no-cc-macos"),
        pytest.param({"cargo": CARGO}, ("C compiler", "gcc or clang"), id="no-cc-elsewhere"),
        pytest.param({"cargo": CARGO, "cc": CC, "python": "exit 1"}, ("Python 3.10",), id="old-python"),
    ],
)
def test_setup_says_what_is_missing(bare_machine, commands, parts):
    lines = bare_machine(**commands)
    assert len(lines) == 1
    assert lines[0].startswith("missing: ")
    assert all(part in lines[0] for part in parts), lines[0]


@NO_SHELL
def test_setup_says_everything_that_is_missing_at_once(bare_machine):
    lines = bare_machine(python="exit 127")
    assert [line.split(".")[0].split(" ")[1] for line in lines] == ["Python", "Rust", "a"]


def add_wheel(index, name, release, requires=""):
    """Puts an empty wheel into a folder that pip reads as a package index."""
    folder = index / re.sub(r"[-_.]+", "-", name).lower()
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{release}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n"
    files = {
        "METADATA": metadata + (f"Requires-Dist: {requires}\n" if requires else ""),
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "".join(f"{stem}.dist-info/{part},,\n" for part in ("METADATA", "WHEEL", "RECORD")),
    }
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        for part, text in files.items():
            archive.writestr(f"{stem}.dist-info/{part}", text)
    links = [f'<a href="{path.name.replace("+", "%2B")}">{path.name}</a>' for path in folder.glob("*.whl")]
    (folder / "index.html").write_text("\n".join(links))


@pytest.mark.slow
def test_setup_never_replaces_torch(tmp_path):
    """Against a made-up package index: torch comes from TORCH_INDEX, then stays, whatever asks for another."""
    listing = run(
        sys.executable, "-c", "import install; print(*install.requirements(), sep='\\n')", cwd=ROOT / "scripts"
    )
    for requirement in map(Requirement, listing.stdout.splitlines()):
        lowest = next(part.version for part in requirement.specifier if part.operator == ">=")
        add_wheel(tmp_path / "pypi", requirement.name, "99.0" if requirement.name == "torch" else lowest)
    add_wheel(tmp_path / "cpu", "torch", "9.0+cpu")
    python = make_environment(tmp_path / "env")

    def packages(torch_index=""):
        env = {"PIP_INDEX_URL": (tmp_path / "pypi").as_uri(), "PIP_FIND_LINKS": "", "PIP_NO_CACHE_DIR": "1"}
        env["TORCH_INDEX"] = torch_index
        return run(python, "-c", "import install; install.packages()", cwd=ROOT / "scripts", check=False, env=env)

    def torch():
        return run(python, "-c", "from importlib.metadata import version as v; print(v('torch'))").stdout.strip()

    first = packages((tmp_path / "cpu").as_uri())
    assert first.returncode == 0, first.stderr
    assert torch() == "9.0+cpu"

    add_wheel(tmp_path / "cpu", "torch", "10.0+cpu")
    again = packages((tmp_path / "cpu").as_uri())
    assert again.returncode == 0, again.stderr
    assert "keeping torch==9.0+cpu" in again.stdout
    assert torch() == "9.0+cpu"

    run(python, "-m", "pip", "uninstall", "-q", "-y", "tensorboard")
    shutil.rmtree(tmp_path / "pypi/tensorboard")
    add_wheel(tmp_path / "pypi", "tensorboard", "3.0", requires="torch>=99")
    greedy = packages()
    assert greedy.returncode != 0
    assert "torch==9.0+cpu" in greedy.stdout + greedy.stderr
    assert torch() == "9.0+cpu"
