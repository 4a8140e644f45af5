"""The demo, cut short: everything it promises is written, and what it prints is true."""

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("torch")
imageio = pytest.importorskip("imageio.v3")

import lewm
from lewm import demo as module


def test_the_demo_leaves_what_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_EPISODES", 30)
    short = dataclasses.replace(module.PROTOCOLS[module._PROTOCOL], pairs=6)
    monkeypatch.setitem(module.PROTOCOLS, module._PROTOCOL, short)
    out = tmp_path / "demo"
    (out / "run").mkdir(parents=True)
    (out / "run" / "old").write_text("of an earlier demo")
    module.demo(out, steps=30)
    assert not (out / "run" / "old").exists()

    result = json.loads((out / "result.json").read_text())
    for key in ("success_rate", "interval", "random_floor", "n", "solved_at_start", "plan_ms", "versions", "seed"):
        assert key in result, key
    model = lewm.load(out / "model.safetensors")
    assert result["model_hash"] == model.hash()
    assert result["n"] == 6
    printed = capsys.readouterr().out
    assert f"{result['success_rate']:.1%} of 6 held-out pairs" in printed
    assert "random actions solve" in printed

    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"{result['success_rate']:.1%} [" in page
    assert "<aside" not in page  # nothing is left out
    assert len(page) < 10_000_000
    report = imageio.imread(out / "report.png")
    assert report.shape[0] > 500
    assert report.std() > 10
    frames = imageio.imread(out / "episode.gif")
    assert len(frames) > 10
    assert np.abs(frames[0].astype(int) - frames[-1]).max() > 50

    # The two lines it prints, run as printed.
    lines = [line.strip() for line in printed.splitlines() if line.startswith("    ")]
    scope = {"obs": np.zeros((64, 64, 3), np.uint8), "goal": np.full((64, 64, 3), 255, np.uint8)}
    exec("\n".join(lines), scope)
    assert scope["action"].shape == (2,)
