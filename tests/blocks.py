"""The code blocks of a Markdown page, and how a test runs them: in their order, with training cut short.

What a block may be: `python` and `sh` run; `python peers` and `python lerobot` need libraries that are not here and are
compiled; `text`, `json`, `yaml`, `toml` and `diff` are to be read.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import lewm
from lewm import cli, collector, evaluation
from lewm.config import PRESETS, ModelConfig, configure
from lewm.model_file import released_names, tensor_shapes
from lewm.recipes import RECIPES
from local_hub import LocalHub

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
COMPILED = ("python peers", "python lerobot")
READ = ("text", "json", "yaml", "toml", "diff")
EPISODES = 12


class Block(NamedTuple):
    """A fenced block: its language, its code, and the page's lines before the code."""

    language: str
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page.

    Raises:
        AssertionError: One is of a language that a page may not have, or a fence is not at the start of a line.
    """
    text = page.read_text(encoding="utf-8")
    found = [
        Block(match[1], match[2], text.count("\n", 0, match.start(2)))
        for match in re.finditer(r"^```([^\n`]*)\n(.*?)^```$", text, re.M | re.S)
    ]
    assert text.count("```") == 2 * len(found), (
        f"{page.name}: a fence is not at the start of its line, or is not closed"
    )
    for block in found:
        assert block.language in ("python", "sh", *COMPILED, *READ), f"{page.name}:{block.line}: {block.language!r}"
    return found


def run(block: Block, page: Path, scope: dict[str, Any]) -> None:
    """Runs a block, Python in `scope` and the commands of a shell one by one, or compiles it, or leaves it alone."""
    if block.language.startswith("python"):
        code = compile("\n" * block.line + block.code, str(page), "exec")
        if block.language == "python":
            exec(code, scope)
    elif block.language == "sh":
        for line in block.code.splitlines():
            command(line)


def command(line: str) -> list[str]:
    """Runs a command of this package; of those that install, build or measure, checks that there is such a thing."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["lewm"]:
        result = CliRunner().invoke(cli.app, words[1:])
        assert result.exit_code == 0, (line, result.output, result.exception)
    elif words[:1] == ["make"]:
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["python", "-m"]:
        assert words[2].startswith("benches."), line
        assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), line
    elif words[:1] == ["python"]:
        assert (ROOT / words[1]).is_file(), line
    elif words:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert words[:2] == ["pip", "install"], line
        wanted = re.fullmatch(r"(?:\.|lewm-fast)(?:\[(.*)\])?", words[2])
        assert wanted, line
        assert set(filter(None, (wanted[1] or "").split(","))) <= set(project["optional-dependencies"])
    return words


def cut_short(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Works in `folder`, and trains, collects and evaluates as little as will do."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("lewm.model._current", None)
    for preset in ("tiny", "small"):
        monkeypatch.setitem(PRESETS[preset].train, "steps", 12)
    monkeypatch.setattr("lewm.heads.STEPS", 12)
    monkeypatch.setattr("lewm.decoder.STEPS", 12)
    own = RECIPES["two-room"]["tiny"]
    monkeypatch.setitem(RECIPES["two-room"], "tiny", dataclasses.replace(own, episodes=EPISODES))
    for name, protocol in evaluation.PROTOCOLS.items():
        monkeypatch.setitem(evaluation.PROTOCOLS, name, dataclasses.replace(protocol, pairs=4))
    whole = collector.collect

    def collect(*args: Any, episodes: int, **settings: Any) -> Any:
        return whole(*args, episodes=min(episodes, EPISODES), **settings)

    monkeypatch.setattr(collector, "collect", collect)
    monkeypatch.setattr(lewm, "collect", collect, raising=False)


def random_model() -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """A small model of random weights."""
    config, _ = configure("tiny", 2, {"encoder_heads": 1, "predictor_heads": 2, "predictor_head_dim": 64})
    rng = np.random.default_rng(0)
    weights = {name: rng.uniform(0.1, 0.3, shape).astype(np.float32) for name, shape in tensor_shapes(config).items()}
    counts = {name: np.array(1) for name in weights if name.endswith("num_batches_tracked")}
    return config, {**weights, **counts}


def leave_the_tutorials_model(folder: Path) -> None:
    """Puts a model where the tutorial leaves one, for pages that go on from there."""
    config, weights = random_model()
    stats = {"mean": [0, 0], "std": [0.5, 0.5], "low": [-1, -1], "high": [1, 1]}
    path = folder / "runs/two-room/model.safetensors"
    path.parent.mkdir(parents=True)
    lewm.Model(config, weights, stats=stats, meta={"preset": "tiny", "planner": PRESETS["tiny"].planner}).save(path)


def hub_with_a_model(monkeypatch: pytest.MonkeyPatch, folder: Path) -> LocalHub:
    """Stands in for the Hugging Face Hub, with a small model of random weights under the official name."""
    constants = pytest.importorskip("huggingface_hub.constants")
    _, weights = random_model()
    state = {name: torch.from_numpy(np.array(value)) for name, value in released_names(weights).items()}
    torch.save(state, folder / "weights.pt")
    hub = LocalHub({"quentinll/lewm-pusht": {"main": {"weights.pt": (folder / "weights.pt").read_bytes()}}})
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    return hub
