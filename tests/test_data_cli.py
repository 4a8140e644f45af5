"""`lewm data` as a user types it."""

import os
import subprocess
import sys

import numpy as np
import pytest

from lewm._core import Store, StoreWriter


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-c", "from lewm.cli import main; main()", "data", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "200"},
    )


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "s.lewm"
    with StoreWriter(
        path, height=8, width=9, action_dim=2, columns={"state": 3}, metadata='{"env_id": "made/up[red]"}'
    ) as writer:
        for count in (4, 6, 5):
            frames = np.random.default_rng(count).integers(0, 256, (count, 8, 9, 3), dtype=np.uint8)
            writer.append(frames, np.zeros((count - 1, 2)), {"state": np.ones((count, 3))})
    return path


def test_info(path):
    done = run("info", path)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(None, 1) for line in done.stdout.splitlines() if not line.startswith("on disk"))
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["episodes"] == "3"
    assert rows["frames"] == "15, 4 to 6 each"
    assert rows["frame"] == "8 x 9 x 3 uint8"
    assert rows["action"] == "2 float32"
    assert rows["columns"] == "state: 3 float64"
    assert rows["fingerprint"] == Store(path).fingerprint()
    assert rows["metadata.env_id"] == '"made/up[red]"'
    assert "on disk" in done.stdout


def test_info_of_an_empty_store_and_of_damage(tmp_path, path):
    with StoreWriter(tmp_path / "e", height=1, width=1, action_dim=1, columns={}, metadata="{}"):
        assert run("info", tmp_path / "e").returncode == 0
    os.truncate(path / "shard-000000.data", 400)
    done = run("info", path)
    assert done.returncode == 1
    assert "needs" in done.stderr
    assert "lewm data repair" in done.stderr


def test_a_store_in_order(path):
    done = run("verify", path)
    assert done.returncode == 0, done.stderr
    assert "3 episodes, 15 frames, all as they were committed" in done.stdout
    done = run("repair", path)
    assert done.returncode == 0, done.stderr
    assert "nothing to repair" in done.stdout
    assert not (path / "damaged").exists()


def test_verify_names_the_damage_and_repair_keeps_the_rest(path):
    data = path / "shard-000000.data"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    done = run("verify", path)
    assert done.returncode == 1
    assert "shard-000000.data: episode 2 is damaged" in done.stderr
    done = run("repair", path, "--dry-run")
    assert done.returncode == 1
    assert "would be done" in done.stdout
    assert data.read_bytes() == content
    done = run("repair", path)
    assert done.returncode == 0, done.stderr
    assert "2 episodes, 10 frames" in done.stdout
    assert (path / "damaged" / "shard-000000.data.0").read_bytes() == content
    assert run("verify", path).returncode == 0
    assert len(Store(path)) == 2


def test_what_a_killed_append_leaves_is_a_note(path):
    with open(path / "shard-000000.data", "ab") as file:
        file.write(b"half an episode")
    done = run("verify", path)
    assert done.returncode == 0
    assert "the last 15 bytes belong to no episode" in done.stdout
    assert run("repair", path).returncode == 0
    assert "note" not in run("verify", path).stdout


def test_no_store_and_a_writer_at_work(tmp_path, path):
    for command in ("verify", "repair", "info"):
        done = run(command, tmp_path / "none")
        assert done.returncode == 2
        assert "No such file" in done.stderr
    for command in ("verify", "repair"):
        assert "not a .lewm store" in run(command, tmp_path).stderr
    with StoreWriter(path, height=8, width=9, action_dim=2, columns={"state": 3}, metadata="{}"):
        done = run("repair", path)
        assert done.returncode == 2
        assert "has a writer at work" in done.stderr
        assert run("verify", path).returncode == 0
