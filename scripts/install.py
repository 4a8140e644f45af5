"""Installs this checkout into the environment that runs it: packages first, then the Rust crate in release mode.

Run by setup.sh. A step is skipped while what decides it is unchanged. An installed torch is never replaced.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("train", "envs", "data", "onnx", "docs", "dev")


def requirements() -> list[str]:
    """What pyproject.toml asks for: to build, to run, and for the extras that the make targets use."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = data["project"]["optional-dependencies"]
    lists = [data["build-system"]["requires"], data["project"]["dependencies"], *(extras[name] for name in EXTRAS)]
    return [requirement for each in lists for requirement in each]


def kept() -> list[str]:
    """Pins for the torch that is installed, and for its triton: ["torch==2.13.0+cpu"]; empty where there is none."""
    pins = []
    for name in ("torch", "triton"):
        try:
            pins.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            continue
    return pins


def pip(*arguments: str) -> None:
    """Runs pip install with torch pinned to the one that is there."""
    with tempfile.TemporaryDirectory() as folder:
        constraint = Path(folder, "kept.txt")
        constraint.write_text("\n".join(kept()), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-c", str(constraint)]
        subprocess.run([*command, *arguments], check=True)


def packages() -> None:
    """Installs everything but lewm-fast itself. All that is downloaded is downloaded here."""
    index = os.environ.get("TORCH_INDEX")
    if pins := kept():
        print(f"setup: keeping {', '.join(pins)}", flush=True)
    elif index:
        print(f"setup: torch comes from {index}", flush=True)
        pip("--index-url", index, "torch")
    elif platform.system() == "Linux":
        print(
            "setup: torch's default build for Linux is the CUDA one, about 5 GB on disk with what it needs. Instead:\n"
            "setup:   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu    takes the CPU build, about 2 GB\n"
            "setup:   make demo VENV=/path/to/an/environment                        uses the torch that is there",
            flush=True,
        )
    # Progress is worth its many lines only while something large comes in.
    pip(*requirements(), *(["-q"] if pins else []))
    subprocess.run(["cargo", "fetch", "--locked", "-q"], cwd=ROOT, check=True)


def build() -> None:
    """Builds lewm._core and installs this checkout in place, from what is already on disk."""
    pip("-q", "--no-deps", "--no-build-isolation", "-e", str(ROOT))


def rust_sources() -> list[Path]:
    """Every file that decides what the build gives."""
    manifests = [ROOT / name for name in ("pyproject.toml", "Cargo.toml", "Cargo.lock")]
    return manifests + sorted(path for path in (ROOT / "rust").rglob("*") if path.suffix in {".rs", ".toml"})


def step(name: str, message: str, inputs: list[bytes], action: Callable[[], None], result: str = "*") -> None:
    """Runs an action unless its stamp in the environment says that it ran on these inputs, and its result is there."""
    stamp = Path(sys.prefix, f"lewm-{name}.stamp")
    digest = hashlib.sha256(b"\0".join(inputs)).hexdigest()
    if stamp.exists() and stamp.read_text() == digest and any(ROOT.glob(result)):
        return
    stamp.unlink(missing_ok=True)
    print(f"setup: {message}", flush=True)
    start = time.perf_counter()
    action()
    stamp.write_text(digest)
    print(f"setup: {name} took {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    """Does both steps. The maturin of this environment, not another one, is the one that pip must find."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    step("packages", f"downloading packages into {sys.prefix}", [text.encode() for text in requirements()], packages)
    inputs = [bytes(ROOT), *(path.read_bytes() for path in rust_sources())]
    step("build", "building the Rust crate (release)", inputs, build, result="python/lewm/_core.abi3.*")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"setup: stopped: {' '.join(map(str, error.cmd[:4]))} ... ended with status {error.returncode}")
    except KeyboardInterrupt:
        sys.exit("setup: interrupted; the same command goes on from here")
