import json

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from typer.testing import CliRunner

import lewm
from lewm import cli, envs
from lewm._core import StoreWriter
from lewm.card import write_card


def test_numbers_of_a_known_store(tmp_path):
    metadata = json.dumps({"action_low": [-1.0], "action_high": [1.0]})
    with StoreWriter(
        tmp_path / "s.lewm", height=8, width=8, action_dim=1, columns={"state": 2}, metadata=metadata
    ) as w:
        for shift in (0.0, 10.0):
            actions = np.array([[-1.0], [0.0], [1.0]], np.float32)
            w.append(np.zeros((4, 8, 8, 3), np.uint8), actions, {"state": np.arange(8.0).reshape(4, 2) + shift})
    card = write_card(tmp_path / "s.lewm", frames_per_second=7.5)
    assert card == json.loads((tmp_path / "s.card" / "card.json").read_text())
    assert (tmp_path / "s.card" / "card.png").read_bytes()[:4] == b"\x89PNG"
    assert (card["episodes"], card["frames"], card["frames_per_second"]) == (2, 8, 7.5)
    assert card["actions_at_a_bound"] == pytest.approx(2 / 3)
    assert card["actions"] == [pytest.approx({"mean": 0, "std": np.sqrt(2 / 3), "min": -1, "max": 1})]
    assert [state["max"] for state in card["states"]] == [16, 17]
    assert card["fingerprint"] == lewm.Dataset(tmp_path / "s.lewm").fingerprint()


def test_collect_writes_it(tmp_path):
    store = str(tmp_path / "rooms.lewm")
    done = CliRunner().invoke(cli.app, ["collect", "lewm/TwoRoom-v0", store, "--episodes", "2", "--size", "16"])
    assert done.exit_code == 0, done.output
    assert "a second)" in done.output
    card = json.loads((tmp_path / "rooms.card" / "card.json").read_text())
    assert card["frames_per_second"] > 0
    assert card["metadata"]["env_id"] == "lewm/TwoRoom-v0"
    done = CliRunner().invoke(cli.app, ["data", "card", store, "--out", str(tmp_path / "here")])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "here" / "card.json").read_text())["frames"] == card["frames"]


def test_no_episodes_and_no_states(tmp_path):
    with StoreWriter(tmp_path / "e.lewm", height=8, width=8, action_dim=1, columns={}, metadata="{}") as writer:
        pass
    with pytest.raises(ValueError, match="data must hold episodes, got none"):
        write_card(tmp_path / "e.lewm")
    with StoreWriter(tmp_path / "f.lewm", height=8, width=8, action_dim=1, columns={}, metadata="{}") as writer:
        writer.append(np.zeros((2, 8, 8, 3), np.uint8), np.zeros((1, 1), np.float32), {})
    assert write_card(tmp_path / "f.lewm")["states"] is None


def test_factors_of_environments():
    pytest.importorskip("pymunk")
    states = np.arange(14.0).reshape(2, 7)
    assert set(envs.factors("lewm/PushT-v0", states)) == {"agent", "block", "angle"}
    assert envs.factors(None, states)["state"] is states
    assert envs.factors("lewm/TwoRoom-v0", states)["agent"] is states
    with pytest.raises(ValueError, match=r"states of lewm/PushT-v0 must be \(N, 7\), got \(2, 3\)"):
        envs.factors("lewm/PushT-v0", states[:, :3])
