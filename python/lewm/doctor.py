"""`lewm doctor`: what of lewm works on this machine, and what to install for the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PACKAGE = "lewm-fast"
_PRECISIONS = ("float32", "bfloat16", "int8")
_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
)
_DRAW = """
import mujoco
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><light pos="0 0 3"/><geom size="1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 16, 16)
renderer.update_scene(data)
assert renderer.render().any(), "the picture is black"
renderer._gl_context.make_current()
from OpenGL.GL import GL_RENDERER, glGetString
print(glGetString(GL_RENDERER).decode())
renderer.close()
"""


def report() -> str:
    """What `lewm doctor` prints: headings, and a line for each finding."""
    lines = []
    for heading, findings in diagnose().items():
        width = max(map(len, findings), default=0)
        lines += [heading, *(f"  {name:{width}}  {finding}" for name, finding in findings.items()), ""]
    return "\n".join(lines[:-1])


def diagnose() -> dict[str, dict[str, str]]:
    """The same as data: heading -> name -> finding. Nothing raises: what goes wrong is the finding."""
    checks: dict[str, Callable[[], dict[str, str]]] = {
        "Machine": _machine,
        "Back ends": _back_ends,
        "Drawing without a window": _drawing,
    }
    found = {heading: _safely(check) for heading, check in checks.items()}
    try:
        extras = _extras()
    except Exception as error:
        return {**found, "Extras": {"?": _one_line(error)}}
    return found | {f"Extra {name}": findings for name, findings in extras.items()}


def _safely(check: Callable[[], dict[str, str]]) -> dict[str, str]:
    try:
        return check()
    except Exception as error:  # a doctor has no right to be ill
        return {"?": _one_line(error)}


def _one_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"


# ------------------------------------------------------------------------------------------------------------- machine


def _machine() -> dict[str, str]:
    from lewm._core import __version__

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    features, model = _processor()
    return {
        "lewm-fast": __version__,
        "Python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "processor": f"{model or platform.processor() or platform.machine()}, {cores} cores for this process",
        "features": " ".join(name for name in _FEATURES if name in features) or "unknown",
    }


def _processor() -> tuple[set[str], str]:
    """Feature flags and model name, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set(), ""
    facts = dict(re.findall(r"^(\w[\w ]*?)\s*: (.*)$", text, re.M))
    flags = facts.get("flags") or facts.get("Features") or ""
    return set(flags.split()), facts.get("model name") or ""


def _back_ends() -> dict[str, str]:
    return {"cpu": _try(_cpu), "cuda": _try(_cuda), "torch": _try(_torch), "onnx": _try(_onnx)}


def _try(check: Callable[[], str]) -> str:
    try:
        return check()
    except Exception as error:
        return _one_line(error)


def _cpu() -> str:
    from lewm._core import Engine

    sets = {name: Engine.instruction_sets(name) for name in _PRECISIONS}
    return "works: " + ", ".join(f"{name} ({each[0]})" if each else f"no {name}" for name, each in sets.items())


def _cuda() -> str:
    missing = _missing("torch", "triton")
    if missing:
        return f"{missing} is not installed: {_install('train')}"
    import torch
    import triton

    versions: str = f"CUDA {torch.version.cuda}, Triton {triton.__version__}"
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return f"torch {torch.__version__} is built without CUDA; Triton {triton.__version__}"
        driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
        return f"{versions}; " + ("torch cannot use the GPU: is the driver too old?" if driver else "no GPU driver")
    from lewm.cuda_backend import PRECISIONS

    gpus = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        enough = torch.version.hip is not None or (found.major, found.minor) >= (8, 0)
        low = "" if enough else ", compute capability below 8.0: backend torch is used"
        gpus.append(f"{found.name} ({found.total_memory / 2**30:.0f} GiB{low})")
    return f"{versions}; {', '.join(gpus)}; {', '.join(PRECISIONS)}"


def _torch() -> str:
    if _missing("torch"):
        return f"torch is not installed: {_install('train')}"
    import torch

    return f"works: torch {torch.__version__}, {torch.get_num_threads()} threads"


def _onnx() -> str:
    missing = _missing("onnx", "onnxruntime")
    if missing:
        return f"{missing} is not installed: {_install('onnx')}"
    import onnx
    import onnxruntime

    providers = ", ".join(onnxruntime.get_available_providers())
    return f"works: onnxruntime {onnxruntime.__version__}, onnx {onnx.__version__}; {providers}"


# ------------------------------------------------------------------------------------------------------------- drawing


def _drawing() -> dict[str, str]:
    """Which GL draws a picture, each tried in a process of its own: a GL that fails takes its process with it."""
    from lewm.envs.rendering import GL_PACKAGES, installed

    if _missing("mujoco"):
        return {"mujoco": f"is not installed: {_install('envs')}"}
    set_to = os.environ.get("MUJOCO_GL", "").lower().strip()
    if sys.platform != "linux":
        return {"MuJoCo's own choice": _draws(set_to)}
    found = {gl: _draws(gl) for gl in GL_PACKAGES}
    used = set_to or next((gl for gl in found if installed(gl)), "")
    if set_to and set_to not in found:
        found[set_to] = _draws(set_to)
    lines = {}
    for gl, finding in found.items():
        packages = "" if finding.startswith("works") or gl not in GL_PACKAGES else f"; apt install {GL_PACKAGES[gl]}"
        lines[gl] = finding + packages
    why = "MUJOCO_GL says so" if set_to else "the first that is installed, for MUJOCO_GL is not set"
    return {**lines, "in use": f"{used} ({why})" if used else "none: install the packages of one of them"}


def _draws(gl: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYOPENGL_PLATFORM"}
    environment |= {"MUJOCO_GL": gl, "LP_NUM_THREADS": "0"}
    try:
        with tempfile.TemporaryDirectory() as folder:  # MuJoCo writes a log where it is
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", _DRAW],
                env=environment,
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=60,
            )
    except subprocess.TimeoutExpired:
        return "does not answer"
    if done.returncode == 0:
        return f"works: {done.stdout.strip()}"
    said = [line for line in done.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception|FatalError)\b", line)]
    return f"does not work ({said[-1] if said else f'code {done.returncode}'})"


# -------------------------------------------------------------------------------------------------------------- extras


def _extras() -> dict[str, dict[str, str]]:
    """Each extra but `dev`: its packages with their versions, or the line that installs what is missing."""
    extras: dict[str, dict[str, str]] = {}
    for line in importlib.metadata.requires(_PACKAGE) or ():
        wanted = re.match(r"([\w.-]+)\s*([^;]*?)\s*(?:;|$)", line)
        extra = re.search(r"""extra\s*==\s*['"]([\w-]+)""", line)
        system = re.search(r"""sys_platform\s*==\s*['"](\w+)""", line)
        if wanted is None or extra is None or extra[1] == "dev" or (system and system[1] != sys.platform):
            continue
        name, limits = wanted.groups()
        try:
            finding = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            finding = f"is not installed: {_install(extra[1])}"
        extras.setdefault(extra[1], {})[name] = finding + (f"  (wants {limits})" if limits else "")
    return extras


def _install(extra: str) -> str:
    return f'pip install "{_PACKAGE}[{extra}]"'


def _missing(*names: str) -> str:
    """The first of these packages that is not there, "" if all are."""
    return next((name for name in names if _spec(name) is None), "")


def _spec(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a module that was set to None, or is half imported
        return None
