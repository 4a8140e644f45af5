import importlib.metadata
import os
import subprocess
import sys

import pytest

from lewm import __version__, doctor
from lewm.doctor import diagnose, report
from lewm.envs.rendering import GL_PACKAGES

HEADINGS = ["Machine", "Back ends", "Drawing without a window"]


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
    """Tests that are about something else do not wait for the processes that draw."""
    monkeypatch.setattr(doctor, "_draws", lambda gl: "works: nothing")
    monkeypatch.delenv("MUJOCO_GL", raising=False)


def test_report_says_everything():
    found = diagnose()
    assert list(found)[:3] == HEADINGS
    assert "Extra train" in found
    assert set(found["Machine"]) == {"lewm-fast", "Python", "system", "processor", "features"}
    assert found["Machine"]["lewm-fast"] == __version__
    assert list(found["Back ends"]) == ["cpu", "cuda", "torch", "onnx"]
    assert found["Back ends"]["cpu"].startswith("works: float32 (")
    text = report()
    for heading, findings in found.items():
        assert f"{heading}\n" in text
        for name, finding in findings.items():
            assert f"  {name}" in text
            assert "\n" not in finding
    assert text.count("\n\n") == len(found) - 1


def test_extras_are_those_of_the_package(monkeypatch):
    lines = [
        "numpy>=1.24",
        "torch>=2.4 ; extra == 'train'",
        'no-such-thing (<4,>=3) ; extra == "train"',
        "winreg-thing>=1 ; sys_platform == 'win32' and extra == 'train'",
        "numpy ; extra == 'envs'",
        "pytest>=8 ; extra == 'dev'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    numpy = importlib.metadata.version("numpy")
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9" if name == "torch" else real(name))
    assert doctor._extras() == {
        "train": {
            "torch": "2.9  (wants >=2.4)",
            "no-such-thing": 'is not installed: pip install "lewm-fast[train]"  (wants (<4,>=3))',
        },
        "envs": {"numpy": numpy},
    }


def test_a_missing_torch_is_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    back_ends = diagnose()["Back ends"]
    expected = 'torch is not installed: pip install "lewm-fast[train]"'
    assert back_ends["cuda"] == back_ends["torch"] == expected


def test_a_missing_mujoco_is_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    drawing = diagnose()["Drawing without a window"]
    assert drawing == {"mujoco": 'is not installed: pip install "lewm-fast[envs]"'}


def test_nothing_raises(monkeypatch):
    def ill(*_):
        raise RuntimeError("out of order\nand more")

    for name in ("_processor", "_missing", "_cpu"):
        monkeypatch.setattr(doctor, name, ill)
    monkeypatch.setattr(importlib.metadata, "requires", ill)
    found = diagnose()
    line = "RuntimeError: out of order"
    assert found["Machine"] == found["Drawing without a window"] == found["Extras"] == {"?": line}
    assert set(found["Back ends"].values()) == {line}
    assert report().count(line) == 7


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MuJoCo chooses")
@pytest.mark.parametrize(
    ("works", "there", "set_to", "used"),
    [
        (("egl",), ("egl",), None, "egl (the first that is installed"),
        (("osmesa",), ("osmesa",), None, "osmesa (the first that is installed"),
        ((), (), None, "none: install"),
        (("egl", "osmesa"), ("egl", "osmesa"), "osmesa", "osmesa (MUJOCO_GL says so)"),
        (("egl",), ("egl",), "glfw", "glfw (MUJOCO_GL says so)"),
    ],
)
def test_what_draws(monkeypatch, works, there, set_to, used):
    pytest.importorskip("mujoco")
    monkeypatch.setattr(doctor, "_draws", lambda gl: "works: x" if gl in works else "does not work (y)")
    monkeypatch.setattr("lewm.envs.rendering.installed", lambda gl: gl in there)
    if set_to:
        monkeypatch.setenv("MUJOCO_GL", set_to)
    found = doctor._drawing()
    assert found.pop("in use").startswith(used)
    assert list(found) == [*GL_PACKAGES, *([set_to] if set_to == "glfw" else [])]
    for gl, packages in GL_PACKAGES.items():
        assert found[gl] == ("works: x" if gl in works else f"does not work (y); apt install {packages}")


def test_drawing_is_tried_in_a_process_of_its_own(monkeypatch):
    pytest.importorskip("mujoco")
    monkeypatch.undo()
    assert doctor._draws("nonsense").startswith("does not work (RuntimeError: invalid value")
    assert doctor._draws("egl").startswith(("works: ", "does not work ("))

    def late(*_, timeout, **__):
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(subprocess, "run", late)
    assert doctor._draws("egl") == "does not answer"


def test_features_of_other_processors(monkeypatch, tmp_path):
    assert isinstance(doctor._processor()[0], set)
    text = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd bf16\nCPU part\t: 0xd40\n"
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(doctor, "Path", lambda _: tmp_path / "cpuinfo")
    assert doctor._processor() == ({"fp", "asimd", "bf16"}, "")
    os.remove(tmp_path / "cpuinfo")
    assert doctor._processor() == (set(), "")
