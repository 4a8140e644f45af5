"""Every block of the README runs, in its order, with training and evaluation cut short."""

import re
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("h5py")
pytest.importorskip("pyarrow")
pytest.importorskip("av")

from blocks import ROOT, blocks, command, cut_short, hub_with_a_model, run
from recorded import columns_of, episodes, write_hdf5

README = ROOT / "README.md"
BLOCKS = blocks(README)


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    cut_short(monkeypatch, tmp_path)
    write_hdf5(tmp_path / "pusht.h5", columns_of(episodes(size=64)))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = hub_with_a_model(monkeypatch, tmp_path)
    yield hub
    hub.close()


def test_there_are_blocks_of_two_languages_only():
    assert {block.language for block in BLOCKS} == {"python", "sh"}


@pytest.mark.usefixtures("hub")
def test_python_blocks(capsys):
    scope = {}
    for block in BLOCKS:
        if block.language == "python":
            run(block, README, scope)
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
    lines = [line for block in BLOCKS if block.language == "sh" for line in block.code.splitlines()]
    ran = {" ".join(command(line)[:2]) for line in lines}
    assert {"make demo", "make test", "pip install"} <= ran
    assert {"lewm collect", "lewm convert", "lewm train", "lewm evaluate"} <= ran


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
