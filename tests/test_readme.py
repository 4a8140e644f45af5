"""Every block of the README runs, in its order, with training and evaluation cut short."""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("h5py")
pytest.importorskip("pyarrow")
pytest.importorskip("av")

import numpy as np
import torch
from typer.testing import CliRunner

from lewm import cli, evaluation
from lewm.config import PRESETS, configure
from lewm.model_file import released_names, tensor_shapes
from lewm.recipes import RECIPES
from local_hub import LocalHub
from recorded import columns_of, episodes, write_hdf5

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lewm.model._current", None)
    monkeypatch.setitem(PRESETS["tiny"].train, "steps", 12)
    monkeypatch.setattr("lewm.heads.STEPS", 12)
    own = RECIPES["two-room"]["tiny"]
    monkeypatch.setitem(RECIPES["two-room"], "tiny", dataclasses.replace(own, episodes=20))
    for name, protocol in evaluation.PROTOCOLS.items():
        monkeypatch.setitem(evaluation.PROTOCOLS, name, dataclasses.replace(protocol, pairs=4))
    write_hdf5(tmp_path / "pusht.h5", columns_of(episodes(size=64)))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands in for the Hugging Face Hub, with a small model of random weights under the official name."""
    constants = pytest.importorskip("huggingface_hub.constants")
    config, _ = configure("tiny", 2, {"encoder_heads": 1, "predictor_heads": 2, "predictor_head_dim": 64})
    rng = np.random.default_rng(0)
    weights = {name: rng.uniform(0.1, 0.3, shape).astype(np.float32) for name, shape in tensor_shapes(config).items()}
    state = {name: torch.from_numpy(np.array(value)) for name, value in released_names(weights).items()}
    counts = {name: torch.tensor(1) for name in state if name.endswith("num_batches_tracked")}
    torch.save({**state, **counts}, tmp_path / "weights.pt")
    hub = LocalHub({"quentinll/lewm-pusht": {"main": {"weights.pt": (tmp_path / "weights.pt").read_bytes()}}})
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.close()


def test_there_are_blocks_of_two_languages_only():
    assert {language for language, _ in BLOCKS} == {"python", "sh"}
    assert README.count("```") == 2 * len(BLOCKS)


@pytest.mark.usefixtures("hub")
def test_python_blocks(capsys):
    scope = {}
    for language, code in BLOCKS:
        if language == "python":
            exec(compile(code, "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert "random" in printed
    assert "raw bounds [-1, 1]" in printed
    assert "torch.Size([4, 4, 64, 64, 3]) torch.Size([4, 3, 10])" in printed
    assert abs(scope["plan"].actions).max() <= 1
    assert scope["plan"].action.shape == (2,)
    assert "pusht-robot (lerobot): 4 episodes, 26 frames" in printed
    assert scope["data"].lengths.tolist() == [30, 50]
    assert scope["official"].bounds()[0].shape == (10,)
    assert sorted(path.name for path in Path("for-them").iterdir()) == ["config.json", "weights.pt"]


def test_shell_blocks():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    ran = set()
    for language, code in BLOCKS:
        for line in code.splitlines() if language == "sh" else []:
            words = shlex.split(line, comments=True)
            if words[0] == "lewm":
                result = CliRunner().invoke(cli.app, words[1:])
                assert result.exit_code == 0, (line, result.output, result.exception)
            elif words[0] == "make":
                subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
            else:
                assert words[:2] == ["pip", "install"]
                wanted = re.fullmatch(r"\.(?:\[(.*)\])?", words[2])
                assert wanted, line
                assert set(filter(None, (wanted[1] or "").split(","))) <= set(extras)
            ran.add(" ".join(words[:2]))
    assert {
        "make demo",
        "make test",
        "lewm collect",
        "lewm train",
        "lewm convert",
        "lewm evaluate",
        "pip install",
    } <= ran


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
