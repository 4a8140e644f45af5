import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from lewm.envs import rendering
from lewm.envs.rendering import GL_PACKAGES, LOOKS, Renderer, choose_gl, halved
from lewm.envs.task import package

MODEL = """
<mujoco><worldbody><light pos="0 0 3"/><camera name="top" pos="0 0 2"/>
<geom type="sphere" size=".3" rgba="1 0 0 1"/><geom type="plane" size="2 2 .1" pos="0 0 -.5"/></worldbody></mujoco>
"""
SCENE = f"""
import os, sys
import lewm.envs.rendering as rendering
def scene(look="official"):
    rendering.choose_gl()
    import mujoco
    model = mujoco.MjModel.from_xml_string('''{MODEL}''')
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return rendering.Renderer(model, "top", look), data
"""


def run(code, **environment):
    """What a fresh interpreter prints, and what it complains about, without MUJOCO_GL unless it is given."""
    rest = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "LP_NUM_THREADS", "DISPLAY")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCENE + code],
        env={**rest, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def no_gl(monkeypatch):
    """A machine without any GL library."""
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(rendering, "installed", lambda gl: False)


# ------------------------------------------------------------------------------------------------------- what is there


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MuJoCo chooses")
@pytest.mark.parametrize(
    ("there", "set_to", "chosen"),
    [
        (("egl", "osmesa"), None, "egl"),
        (("osmesa",), None, "osmesa"),
        ((), None, ""),
        (("egl",), "", "egl"),
        (("egl", "osmesa"), "osmesa", "osmesa"),  # what is set wins
        ((), "glfw", "glfw"),
        ((), " EGL", "egl"),  # MuJoCo reads it so
    ],
)
def test_choice_of_gl(monkeypatch, there, set_to, chosen):
    monkeypatch.setattr(rendering, "installed", lambda gl: gl in there)
    monkeypatch.setenv("MUJOCO_GL", "" if set_to is None else set_to)
    if set_to is None:
        monkeypatch.delenv("MUJOCO_GL")
    assert choose_gl() == chosen
    assert os.environ.get("MUJOCO_GL", "").strip().lower() == chosen  # for the processes that this one starts


def test_threads_of_the_rasteriser_that_are_set_stay(monkeypatch):
    monkeypatch.setenv("LP_NUM_THREADS", "3")
    choose_gl()
    assert os.environ["LP_NUM_THREADS"] == "3"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MuJoCo chooses")
def test_missing_gl_is_one_line_that_installs_it(no_gl):
    mujoco = pytest.importorskip("mujoco")
    model = mujoco.MjModel.from_xml_string(MODEL)
    renderer = Renderer(model, "top", "light")
    with pytest.raises(OSError, match="needs a GL library") as caught:
        renderer.draw(mujoco.MjData(model), 16)
    text = str(caught.value)
    assert f"apt install {GL_PACKAGES['egl']}" in text
    assert GL_PACKAGES["osmesa"] in text
    assert "\n" not in text


@pytest.mark.parametrize(("gl", "hint"), [("egl", "apt install libegl1"), ("glfw", "unset MUJOCO_GL")])
def test_broken_gl_is_one_line(monkeypatch, gl, hint):
    mujoco = pytest.importorskip("mujoco")
    monkeypatch.setenv("MUJOCO_GL", gl)

    def broken(gl):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'\nmore")

    monkeypatch.setattr(rendering, "_use", broken)
    model = mujoco.MjModel.from_xml_string(MODEL)
    with pytest.raises(OSError, match=f"MUJOCO_GL={gl} .*eglQueryString.*{hint}") as caught:
        Renderer(model, "top", "light").draw(mujoco.MjData(model), 16)
    assert "\n" not in str(caught.value)


def test_missing_package_is_one_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        package("mujoco", "lewm/Reacher-v0")
    expected = 'lewm/Reacher-v0 needs mujoco, which is not installed: pip install "lewm-fast[envs]"'
    assert str(caught.value) == expected
    assert package("json", "a test").dumps([]) == "[]"


def test_importing_needs_no_engine():
    code = (
        "import lewm.envs.reacher, lewm.envs.cube; print(*sorted({'mujoco', 'ogbench', 'OpenGL'} & set(sys.modules)))"
    )
    assert run(code)[0].strip() == ""


# ------------------------------------------------------------------------------------------------------------ drawing


def test_halved():
    picture = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    mean = picture.reshape(3, 2, 4, 2, 3).mean(axis=(1, 3))
    np.testing.assert_array_equal(halved(picture), np.floor(mean + 0.5))
    assert halved(np.full((4, 4, 3), 255, np.uint8)).min() == 255


@pytest.fixture
def scene():
    """Gives Renderer and data of a look, or skips where nothing can be drawn."""
    choose_gl()
    mujoco = pytest.importorskip("mujoco")
    made = []

    def make(look):
        model = mujoco.MjModel.from_xml_string(MODEL)
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        renderer = Renderer(model, "top", look)
        made.append(renderer)
        try:
            renderer.draw(data, 16)
        except OSError as error:
            pytest.skip(str(error))
        return renderer, data

    yield make
    for renderer in made:
        renderer.close()


@pytest.mark.parametrize("look", LOOKS)
def test_pictures_of_all_sizes(scene, look):
    renderer, data = scene(look)
    means = []
    for size in (16, 64, 33, 224, 16):
        picture = renderer.draw(data, size)
        assert picture.shape == (size, size, 3)
        assert picture.dtype == np.uint8
        centre = picture[size // 2, size // 2].astype(int)
        assert centre[0] > 2 * centre[1]  # the red ball
        means.append(picture.mean())
    assert max(means) - min(means) < 3
    assert means[0] == means[-1]


def test_close_frees_and_a_later_draw_works(scene):
    renderer, data = scene("light")
    before = renderer.draw(data, 32)
    assert len(renderer._made) == 2
    renderer.close()
    renderer.close()
    assert not renderer._made
    np.testing.assert_array_equal(renderer.draw(data, 32), before)


def test_exit_without_close_is_silent(scene):
    scene("official")
    code = "r, d = scene(); print(r.draw(d, 16).mean() > 0); other, d2 = scene('light'); other.draw(d2, 16)"
    assert run(code) == ("True\n", "")


@pytest.mark.parametrize("look", LOOKS)
def test_triton_can_be_imported_after_a_picture(scene, look):
    pytest.importorskip("triton")
    scene(look)
    for first in ("", "rendering.choose_gl(); import dm_control.mujoco; "):  # which starts EGL by itself
        code = f"{first}r, d = scene({look!r}); r.draw(d, 16); import triton, triton._C.libtriton; print('both')"
        if not first or importlib.util.find_spec("dm_control"):
            assert run(code)[0] == "both\n"  # without care it dies: Mesa and Triton bring two versions of LLVM


def test_mujoco_imported_before_the_choice(scene):
    scene("official")
    code = "import mujoco; assert 'MUJOCO_GL' not in os.environ; r, d = scene(); print(r.draw(d, 16).mean() > 0)"
    assert run(code)[0] == "True\n"


FORK = """
r, d = scene()
before = r.draw(d, 16)
pid = os.fork()
if pid == 0:
    try:
        print((r.draw(d, 16) == before).all(), flush=True)
        r.close()
    except OSError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
print((r.draw(d, 16) == before).all())
"""


def test_a_forked_process_draws_too(scene):
    scene("official")
    out, complaints = run(FORK)
    assert out.split() == ["True", "True"]
    assert complaints == ""


def test_a_forked_process_does_not_wait_for_threads_it_lacks(scene):
    scene("official")
    out, _ = run(FORK, LP_NUM_THREADS="2")
    assert out.splitlines()[0].startswith("this process was forked from one that had drawn")
    assert out.splitlines()[1] == "True"
