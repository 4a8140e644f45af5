"""The page of a run: valid, whole, without a network, and safe whatever the files say."""

import base64
import csv
import dataclasses
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
imageio = pytest.importorskip("imageio.v3")
html5lib = pytest.importorskip("html5lib")

from typer.testing import CliRunner

import lewm
from lewm import cli, evaluation, page
from lewm._core import StoreWriter
from lewm.losses import sigreg_directions
from lewm.pictures import BLUE, RED, principal, read_metrics

SMALL = {"encoder_dim": 16, "encoder_mlp": 32, "encoder_depth": 1, "predictor_dim": 16, "predictor_mlp": 32,
         "predictor_depth": 1, "projector_hidden": 32, "embed_dim": 8, "action_hidden": 16, "batch_size": 16,
         "directions": 32, "image_size": 16, "patch_size": 8, "distance_head": False,
         "action_prior": False}  # fmt: skip
SECTIONS = ["summary", "success", "training", "sigreg", "rank", "straightness", "probes", "surprise", "maps",
            "plans", "episodes", "run"]  # fmt: skip
ELEMENTS = re.compile(
    "html|head|meta|title|style|body|header|h[123]|p|code|nav|ul|li|a|aside|main|section|div|table|thead|tbody|tr|th|td|"
    "figure|img|figcaption|details|summary|br"
)
ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "id", "href", "class", "scope", "src", "alt",
              "aria-label"}  # fmt: skip
FRAMES = 64
ATTACK = "</td></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'&$\\frac{\x00\u202e\ud800 -->"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run beside its data, with a result, probes, clips and a GIF, as a user leaves them."""
    folder = tmp_path_factory.mktemp("runs")
    data = lewm.collect("lewm/TwoRoom-v0", folder / "rooms.lewm", episodes=14, size=16, seed=0)
    run = folder / "run"
    model = lewm.train(data, preset="tiny", out=run, steps=24, device="cpu", **SMALL)
    planner = lewm.CEM(samples=8, iterations=1, elites=2, horizon=5)
    lewm.evaluate(model, "two-room-25-50", pairs=3, planner=planner, out=run / "rooms.json")
    (run / "voe").mkdir()
    (run / "voe" / "voe.json").write_text(json.dumps(lewm.voe(model, clips=3, blocks=4).to_dict()))
    imageio.imwrite(run / "episode.gif", np.zeros((2, 8, 8, 3), np.uint8))
    return run


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of it, for a test to spoil that looks at no figures: they are drawn, but not laid out."""
    shutil.copytree(trained.parent, tmp_path / "runs")
    (tmp_path / "runs" / "run" / "report.html").unlink(missing_ok=True)
    monkeypatch.setattr(page.FigureCanvasSVG, "print_svg", lambda self, file, metadata: file.write("<svg></svg>"))
    return tmp_path / "runs" / "run"


def made(run, **settings):
    """The page's text and its tree, strictly parsed: any parse error is an exception."""
    text = lewm.report(run, frames=FRAMES, **settings).read_text(encoding="utf-8")
    return text, html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)


def shown(tree):
    return [section.get("id") for section in tree.iter("section")]


def notes(tree):
    return ["".join(note.itertext()) for aside in tree.iter("aside") for note in aside.iter("li")]


def drawings(tree):
    """The SVGs of the page, parsed."""
    sources = [image.get("src") for image in tree.iter("img")]
    kind = "data:image/svg+xml;base64,"
    return [ElementTree.fromstring(base64.b64decode(s[len(kind) :])) for s in sources if s.startswith(kind)]


def assert_harmless(tree):
    """Nothing but text, tables and pictures that are in the page."""
    for element in tree.iter():
        if isinstance(element.tag, str):
            assert ELEMENTS.fullmatch(element.tag), element.tag
            assert set(element.keys()) <= ATTRIBUTES, element.keys()
            assert re.match("#[a-z]+$", element.get("href", "#a")), element.get("href")
            assert element.get("src", "data:image/").startswith("data:image/"), element.get("src")[:50]
    for drawing in drawings(tree):
        for element in drawing.iter():
            assert element.tag.rpartition("}")[2] != "script"
            for name, value in element.items():
                assert not name.startswith("on")
                assert "href" not in name or value.startswith(("#", "data:image/png;base64,"))


def test_a_whole_run_is_a_whole_page(trained):
    text, tree = made(trained)
    assert shown(tree) == SECTIONS
    assert [link.get("href") for link in tree.iter("a")] == [f"#{name}" for name in SECTIONS]
    assert notes(tree) == []
    assert_harmless(tree)
    assert (trained / "report.html").stat().st_size < 10_000_000
    assert tree.get("lang") == "en"
    policy = {m.get("http-equiv"): m.get("content") for m in tree.iter("meta")}["Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "prefers-color-scheme:dark" in text
    for figure in tree.iter("figure"):
        assert figure.find("img").get("alt")
        assert len("".join(figure.find("figcaption").itertext())) > 20
    found = drawings(tree)
    assert len(found) == 8
    assert page._INK not in text
    assert all("currentColor" in ElementTree.tostring(drawing, "unicode") for drawing in found)
    # What the tables say is what the files say.
    result = evaluation.Result.load(trained / "rooms.json")
    model = lewm.load(trained)
    cells = {"".join(cell.itertext()) for cell in tree.iter("td")}
    low, high = result.interval
    assert f"{result.success_rate:.1%} [{low:.1%}, {high:.1%}]" in cells
    assert {model.meta["data"]["fingerprint"], model.meta["training"]["versions"]["torch"]} <= cells
    voe = json.loads((trained / "voe" / "voe.json").read_text())
    assert f"{voe['tests']['physical']['t']:.2f}" in cells

    # The same bytes again, also elsewhere.
    again = lewm.report(trained, frames=FRAMES, out=trained.parent / "else" / "where.html")
    assert again.read_text(encoding="utf-8") == text


def test_the_numbers_of_a_direction_are_sigregs(naive_sigreg):
    z = np.random.default_rng(0).normal(0.3, 1.7, (53, 5)).astype(np.float32)
    directions = sigreg_directions(5, 7, seed=3, step=0)
    found = page._per_direction(z, directions)
    for p in range(7):
        want = naive_sigreg(torch.from_numpy(z)[None], directions[:, p : p + 1]).item()
        assert found[p] == pytest.approx(want, rel=1e-5)  # float32
    normal = np.random.default_rng(1).standard_normal((400, 5)).astype(np.float32)
    assert page._per_direction(normal, sigreg_directions(5, 256, seed=0, step=0)).mean() < 3


def test_principal_components():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(300, 4)) * [3, 1, 0.1, 0]
    scores, share = principal(z)
    values = np.linalg.eigvalsh(np.cov(z, rowvar=False))[::-1]
    np.testing.assert_allclose(share, values / values.sum(), atol=1e-12)
    np.testing.assert_allclose(scores.var(0, ddof=1), values, atol=1e-12)
    assert principal(np.ones((5, 3)))[1].sum() == 0


def test_what_files_say_is_never_markup(run, monkeypatch):
    monkeypatch.undo()  # figures too
    # Wherever a file has text: the model, the configuration, the log, a result, names of files.
    model = lewm.load(run)
    meta = dict(model.meta)
    meta["preset"] = ATTACK.replace("\ud800", "")
    meta["data"] |= {"env_id": ATTACK, "env_kwargs": ATTACK, ATTACK: {ATTACK: [ATTACK]}}
    meta["training"]["versions"] = {ATTACK: ATTACK}
    meta["training"]["device"] = "x" * 100_000
    model.meta = meta
    model.save(run / "model.safetensors")
    config = json.loads((run / "config.json").read_text())
    config["train"][ATTACK] = config["model"][ATTACK] = ATTACK
    (run / "config.json").write_text(json.dumps(config))
    with (run / "metrics.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    with (run / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        own = ATTACK.replace("\ud800", "").replace("\x00", "")
        csv.writer(file, lineterminator="\n").writerows([[*header, own], *([*row, "1"] for row in rows)])
    result = json.loads((run / "rooms.json").read_text())
    result["command"] = result["protocol"]["name"] = result["versions"]["cpu"] = ATTACK
    (run / "<b>&amp;.json").write_text(json.dumps(result))
    (run / "<i>.json").write_text('{"<script>": 1}')
    text, tree = made(run)
    assert_harmless(tree)
    assert notes(tree)[0].startswith("<i>.json: left out. It is nothing that")
    assert "script" in text  # it is there, as text
    assert "alert(1)" in "".join(tree.find(".//section[@id='run']").itertext())
    assert len(text) < 10_000_000
    assert "x" * 3000 not in text


def test_an_environments_id_imports_nothing(run, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = lewm.load(run)
    model.meta["data"]["env_id"] = "evil:lewm/TwoRoom-v0"
    model.save(run / "model.safetensors")
    (run / "episode.gif").unlink()
    assert "episodes" not in shown(made(run)[1])


def test_a_run_that_goes_on(run):
    for name in ("model.safetensors", "rooms.json", "episode.gif"):
        (run / name).unlink()
    shutil.rmtree(run / "voe")
    with (run / "metrics.csv").open("a") as file:
        file.write("40,0.1,0.")  # being written
    _, tree = made(run)
    assert shown(tree) == ["summary", "training", "rank", "straightness", "run"]
    assert len(notes(tree)) == 1
    assert "no model.safetensors" in notes(tree)[0]
    (run / "config.json").write_text("[" * 100_000)
    assert any("config.json: left out" in note for note in notes(made(run)[1]))
    (run / "metrics.csv").write_text("step,loss\n")  # before the first line
    assert shown(made(run)[1]) == ["summary", "run"]


def test_data_are_found_given_or_said_to_be_missing(run):
    store = run.parent / "rooms.lewm"
    moved = store.rename(run.parent / "elsewhere")
    (run.parent / "other.lewm").mkdir()
    _, tree = made(run)
    assert shown(tree) == [name for name in SECTIONS if name not in ("sigreg", "probes", "maps", "plans")]
    assert "No store in or beside" in notes(tree)[0]
    assert made(run, data=moved)[0] == made(run, data=lewm.Dataset(moved))[0]
    _, tree = made(run, data=moved)
    assert shown(tree) == SECTIONS
    moved.rename(run / "data.lewm")
    assert shown(made(run)[1]) == SECTIONS

    other = lewm.collect("lewm/TwoRoom-v0", run.parent / "own.lewm", episodes=6, size=16, seed=5)
    assert "not those that the model learnt from" in notes(made(run, data=other)[1])[0]
    with pytest.raises(FileNotFoundError):
        lewm.report(run, data=run / "no.lewm")


def write_store(path, frame, state, columns, action_dim=2, length=31):
    metadata = {"action_low": [-1] * action_dim, "action_high": [1] * action_dim}
    rng = np.random.default_rng(0)
    with StoreWriter(
        str(path), height=16, width=16, action_dim=action_dim, columns=columns, metadata=json.dumps(metadata)
    ) as writer:
        for _ in range(8):
            frames = np.stack([frame(rng) for _ in range(length)])
            actions = rng.uniform(-1, 1, (length - 1, action_dim)).astype(np.float32)
            writer.append(frames, actions, {name: state(rng, (length, n)) for name, n in columns.items()})
    return lewm.Dataset(path)


def random_frame(rng):
    return rng.integers(0, 256, (16, 16, 3), np.uint8)


def test_a_section_that_cannot_be_made_leaves_the_others(run, tmp_path):
    same = write_store(tmp_path / "same.lewm", random_frame, lambda _, shape: np.full(shape, 3.0), {"state": 2})
    _, tree = made(run, data=same)
    assert shown(tree) == [name for name in SECTIONS if name not in ("probes", "maps")]
    assert any(note.startswith("Probes: left out. states must vary") for note in notes(tree))
    assert any(note.startswith("Maps of the latent space: left out. state must have") for note in notes(tree))

    still = write_store(tmp_path / "still.lewm", lambda _: np.full((16, 16, 3), 9, np.uint8),
                        lambda rng, shape: rng.normal(size=shape), {"state": 2})  # fmt: skip
    _, tree = made(run, data=still)
    assert {"sigreg", "rank"} <= set(shown(tree))
    assert not {"probes", "maps"} & set(shown(tree))
    assert any("points that differ" in note for note in notes(tree))

    plain = write_store(tmp_path / "plain.lewm", random_frame, None, {})
    _, tree = made(run, data=plain)
    assert shown(tree) == [name for name in SECTIONS if name != "probes"]
    assert "coloured by the number of the frame" in "".join(tree.itertext())

    short = write_store(tmp_path / "short.lewm", random_frame, lambda rng, shape: rng.normal(size=shape),
                        {"<script>": 2}, length=3)  # fmt: skip
    text, tree = made(run, data=short)
    assert_harmless(tree)
    assert "held-out episodes:" not in text  # no straightness of three frames that are one step

    wide = write_store(tmp_path / "wide.lewm", random_frame, None, {}, action_dim=3)
    with pytest.raises(ValueError, match="data must have actions of width 2, as the model, got 3"):
        lewm.report(run, data=wide)


def test_it_steers_an_episode_where_none_is_shown(run, monkeypatch):
    (run / "episode.gif").unlink()
    own = dataclasses.replace(evaluation.PROTOCOLS["two-room-25-50"], budget=4)
    monkeypatch.setitem(page.PROTOCOLS, own.name, own)
    monkeypatch.setattr(page, "_PAIRS", 2)
    _, tree = made(run)
    (image,) = tree.find(".//section[@id='episodes']").iter("img")
    kind = "data:image/gif;base64,"
    assert image.get("src").startswith(kind)
    frames = imageio.imread(base64.b64decode(image.get("src")[len(kind) :]), extension=".gif")
    assert len(frames) > 4
    assert not list(run.glob("*.gif"))


def test_pictures_that_are_too_large_or_none(run):
    (run / "zz.gif").write_bytes(b"GIF89a" + bytes(5_000_000))
    _, tree = made(run)
    assert any(note.startswith("zz.gif and what follows") for note in notes(tree))
    (run / "a.gif").write_bytes(b"<svg onload=alert(1)>")
    assert any("a.gif is no GIF" in note for note in notes(made(run)[1]))


def test_results_of_other_weights_are_said_to_be(run):
    model = lewm.load(run, backend="torch")
    with torch.no_grad():
        next(model.network.parameters()).add_(0.01)
    model.save(run / "model.safetensors")
    assert made(run)[0].count("of OTHER WEIGHTS") == 2  # the result, the clips


def test_what_is_no_run(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="run: no such folder"):
        lewm.report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"run must be a folder of lewm train, with metrics.csv or model.safetensors"):
        lewm.report(tmp_path)
    for wrong, text in (({"frames": 2}, "frames"), ({"seed": -1}, "seed")):
        with pytest.raises(ValueError, match=text):
            lewm.report(run, **wrong)
    before = (run / "metrics.csv").read_text()
    for content in ("step,loss\n1,x\n", "loss\n1\n", "step,loss\n1,2,3\n", "step\n" + "9" * 200_000 + "\n"):
        (run / "metrics.csv").write_text(content)
        with pytest.raises(ValueError, match=r"metrics.csv must be a table of numbers over step"):
            lewm.report(run)
    (run / "metrics.csv").write_text(before)
    (run / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(ValueError, match="model"):
        lewm.report(run)
    assert not (run / "report.html").exists()


def test_the_log_is_read_as_far_as_it_is_whole(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss,probe_r2\n1,2.5,\n20,nan,0.5\n40,1.5,0.75\n60,1")
    found = read_metrics(tmp_path)
    assert {name: (s.tolist(), v.tolist()) for name, (s, v) in found.items()} == {
        "step": ([1, 20, 40], [1, 20, 40]),
        "loss": ([1, 40], [2.5, 1.5]),
        "probe_r2": ([20, 40], [0.5, 0.75]),
    }


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        ([8, 8, 8, 8], "No collapse"),
        ([1, 8, 8, 8], "No collapse"),  # within the grace
        ([8, 8, 1.1, 8], "from step 200, last at step 200"),
        ([8, 8, 1.1, 1.1], "from step 200, and at the end still"),
    ],
)
def test_a_collapse_is_said(tmp_path, ranks, says):
    rows = "".join(f"{step},{rank},1,0.01\n" for step, rank in zip((1, 100, 200, 300), ranks, strict=True))
    (tmp_path / "metrics.csv").write_text(f"step,effective_rank,embedding_std,sigreg_per_sample\n{rows}")
    (tmp_path / "config.json").write_text(json.dumps({"train": {"warmup": 0.05, "steps": 300}}))
    assert says in "".join(made(tmp_path)[1].itertext())
    (tmp_path / "config.json").write_text(json.dumps({"train": {"warmup": 0.05, "steps": 10_000}}))
    assert "Too few steps" in "".join(made(tmp_path)[1].itertext())


def test_the_command(trained, tmp_path):
    out = tmp_path / "page.html"
    done = CliRunner().invoke(
        cli.app, ["report", str(trained), "--data", str(trained.parent / "rooms.lewm"), "--out", str(out),
                  "--frames", str(FRAMES)],
    )  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.output.strip() == str(out)
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert isinstance(CliRunner().invoke(cli.app, ["report", str(tmp_path)]).exception, ValueError)


@pytest.mark.slow
def test_a_browser_shows_it_and_asks_for_nothing(trained, tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")

    def screenshot(path, scheme):
        """Pixels, and the origins that asked for something: "not an origin" is the browser itself."""
        shot, log = tmp_path / "shot.png", tmp_path / "log.json"
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
             "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1100,4000",
             f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}",
             f"--log-net-log={log}", f"--screenshot={shot}", path.as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        origins = set(re.findall(r'"initiator":"([^"]*)"', log.read_text(errors="replace")))
        return np.asarray(pillow.open(shot).convert("RGB")).astype(int), origins - {"not an origin"}

    path = lewm.report(trained, frames=FRAMES, out=tmp_path / "page.html")
    (light, asked), (dark, asked_too) = screenshot(path, 1), screenshot(path, 0)
    assert asked == asked_too == set()
    for pixels in (light, dark):
        for colour in (RED, BLUE):
            wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            assert (np.abs(pixels - wanted).max(-1) < 4).sum() > 100, colour
    assert light[0, 0].sum() == 3 * 255
    assert dark[0, 0].sum() < 150

    loud = tmp_path / "loud.html"  # what a page looks like that does ask
    loud.write_text('<!DOCTYPE html><title>x</title><img src="http://10.1.2.3/x.png" alt="">')
    assert screenshot(loud, 1)[1]
