"""Training: the losses fall, a resumed run is the same run, and what goes wrong is said."""

import csv
import json
import signal
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import lewm
from lewm import trainer
from lewm._core import StoreWriter
from lewm.model_file import read_tensors, write_tensors

# The smallest network that still has every part.
TINY = {"encoder_dim": 16, "encoder_mlp": 32, "encoder_depth": 1, "predictor_dim": 16, "predictor_mlp": 32,
        "predictor_depth": 1, "projector_hidden": 32, "embed_dim": 8, "action_hidden": 16, "batch_size": 16,
        "directions": 32, "image_size": 16, "patch_size": 8}  # fmt: skip


def write_store(path, episodes=10, length=40, seed=0, size=16, action=None, high=1):
    """A square that moves by its actions."""
    rng = np.random.default_rng(seed)
    metadata = {"action_low": [-1, -1], "action_high": [high, high], "env_id": "square"}
    with StoreWriter(
        str(path), height=size, width=size, action_dim=2, columns={"state": 2}, metadata=json.dumps(metadata)
    ) as writer:
        for _ in range(episodes):
            actions = rng.uniform(-1, 1, (length - 1, 2)).astype(np.float32) if action is None else action(length - 1)
            state = np.cumsum(np.concatenate([rng.uniform(4, 12, (1, 2)), actions]), 0) % (size - 4)
            frames = np.zeros((length, size, size, 3), np.uint8)
            for frame, (x, y) in zip(frames, state.astype(int), strict=True):
                frame[y : y + 4, x : x + 4] = (255, 80, 20)
            writer.append(frames, actions, {"state": state})
    return lewm.Dataset(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "square.lewm")


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_learns_and_leaves_its_files(store, tmp_path):
    seen = []
    model = lewm.train(
        store, preset="tiny", out=tmp_path / "run", steps=120, device="cpu", checkpoint_every=60,
        progress=lambda done, total, metrics: seen.append((done, total, metrics.get("loss"))), **TINY,
    )  # fmt: skip
    table = rows(tmp_path / "run")
    first, last = table[0], table[-1]
    assert float(last["loss"]) < float(first["loss"])
    assert [s[0] for s in seen] == list(range(1, 121))
    assert seen[-1][1] == 120
    assert int(last["step"]) == 120
    for name in ("validation_prediction", "probe_r2", "distance_correlation"):
        assert np.isfinite(float(last[name])), name
    assert -1 <= float(last["straightness"]) <= 1
    for name in ("sigreg_per_sample", "embedding_std", "effective_rank", "learning_rate", "gradient_norm"):
        assert float(last[name]) >= 0, name
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    loaded = lewm.load(tmp_path / "run", device="cpu")
    assert loaded.hash() == model.hash()
    training = loaded.meta["training"]
    assert training["steps"] == 120
    train_episodes, validation = store.split(0.1, 0)
    assert training["validation_episodes"] == list(validation)
    assert not set(train_episodes) & set(validation)
    assert loaded.meta["data"]["fingerprint"] == store.fingerprint()
    np.testing.assert_allclose(loaded.stats["mean"], store.action_statistics(train_episodes)["mean"])


def test_eval_mode_agrees_with_batch_statistics_after_the_precise_pass(store, tmp_path):
    """The released recipe's running statistics can inflate the eval-mode loss hundreds of times."""
    lewm.train(store, preset="tiny", out=tmp_path / "run", steps=60, device="cpu", **TINY)
    model = lewm.load(tmp_path / "run", backend="torch")
    index = store.windows(range(len(store)), 4, 5)[::3]
    frames, actions = store.batch(index, 4, 5)
    blocks = torch.from_numpy(model.normalise(actions)).float()

    def loss():
        z = model.network.encode(torch.from_numpy(frames))
        embedded = model.network.action_encoder(blocks)
        predicted = model.network.predict(z[:, :-1].reshape(-1, 1, 8), embedded.reshape(-1, 1, 8))
        return (predicted.view(z[:, 1:].shape) - z[:, 1:]).square().mean().item()

    with torch.no_grad():
        running = loss()
        model.network.train()
        assert running == pytest.approx(loss(), rel=0.3)


def strip(row):
    return {k: v for k, v in row.items() if k != "seconds"}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_is_the_same_run(store, tmp_path, dropout):
    settings = {**TINY, "steps": 60, "dropout": dropout, "history": 2}
    arguments = {"preset": "tiny", "device": "cpu", "checkpoint_every": 20, "seed": 3}
    whole = lewm.train(store, out=tmp_path / "whole", **arguments, **settings)

    def interrupt(done, total, metrics):
        if done == 47:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lewm.train(store, out=tmp_path / "cut", progress=interrupt, **arguments, **settings)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    torch.manual_seed(12345)  # whatever else the process did
    resumed = lewm.train(store, out=tmp_path / "cut", resume=True, **arguments, **settings)
    assert resumed.hash() == whole.hash()
    assert [strip(r) for r in rows(tmp_path / "cut")] == [strip(r) for r in rows(tmp_path / "whole")]


def test_ctrl_c_in_the_middle_of_a_step_is_held_until_its_end(store, tmp_path, monkeypatch):
    settings = {**TINY, "steps": 40}
    arguments = {"preset": "tiny", "device": "cpu", "seed": 5}
    whole = lewm.train(store, out=tmp_path / "whole", **arguments, **settings)
    step = torch.optim.AdamW.step
    calls = []

    def interrupted(*args, **kwargs):
        result = step(*args, **kwargs)
        calls.append(None)
        if len(calls) == 13:
            signal.raise_signal(signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lewm.train(store, out=tmp_path / "cut", **arguments, **settings)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(calls) == 13
    resumed = lewm.train(store, out=tmp_path / "cut", resume=True, **arguments, **settings)
    assert resumed.hash() == whole.hash()
    assert [strip(r) for r in rows(tmp_path / "cut")] == [strip(r) for r in rows(tmp_path / "whole")]


def test_a_run_killed_after_a_checkpoint_resumes_from_it(store, tmp_path):
    """Rows logged after the last checkpoint are written again, not twice."""
    settings = {**TINY, "steps": 80}
    arguments = {"preset": "tiny", "device": "cpu", "checkpoint_every": 30, "seed": 1}
    whole = lewm.train(store, out=tmp_path / "whole", **arguments, **settings)

    class Killed(BaseException):
        pass

    def kill(done, total, metrics):
        if done == 45:
            raise Killed

    with pytest.raises(Killed):
        lewm.train(store, out=tmp_path / "cut", progress=kill, **arguments, **settings)
    assert [r["step"] for r in rows(tmp_path / "cut")] == ["1", "20", "30", "40"]
    resumed = lewm.train(store, out=tmp_path / "cut", resume=True, **arguments, **settings)
    assert resumed.hash() == whole.hash()
    assert [strip(r) for r in rows(tmp_path / "cut")] == [strip(r) for r in rows(tmp_path / "whole")]


def test_a_run_killed_before_its_first_checkpoint_resumes_from_the_start(store, tmp_path):
    arguments = {"preset": "tiny", "device": "cpu", "steps": 12, **TINY}
    whole = lewm.train(store, out=tmp_path / "whole", **arguments)

    def kill(done, total, metrics):
        if done == 5:
            raise GeneratorExit  # neither Ctrl-C nor an error: nothing is saved

    with pytest.raises(GeneratorExit):
        lewm.train(store, out=tmp_path / "cut", progress=kill, **arguments)
    resumed = lewm.train(store, out=tmp_path / "cut", resume=True, **arguments)
    assert resumed.hash() == whole.hash()
    assert [strip(r) for r in rows(tmp_path / "cut")] == [strip(r) for r in rows(tmp_path / "whole")]


@pytest.mark.parametrize("log", [None, "", "no,table\nof ours\n"])
def test_a_finished_run_resumes_to_the_same_model_and_without_its_log(store, tmp_path, log):
    arguments = {"preset": "tiny", "out": tmp_path / "run", "device": "cpu", "steps": 3, **TINY}
    whole = lewm.train(store, **arguments)
    path = tmp_path / "run" / "metrics.csv"
    path.unlink() if log is None else path.write_text(log)
    (tmp_path / "run" / "model.safetensors").unlink()
    assert lewm.train(store, resume=True, **arguments).hash() == whole.hash()
    assert lewm.load(tmp_path / "run").hash() == whole.hash()
    assert path.read_text() == ",".join(trainer._COLUMNS) + "\n"


def test_a_loss_that_is_not_finite_ends_the_run_and_says_what_to_do(store, tmp_path):
    settings = {**TINY, "steps": 60, "learning_rate": 1e30, "clip": 1e30}
    with pytest.raises(FloatingPointError, match=r"lower learning_rate \(now 1e\+30\)"):
        lewm.train(store, preset="tiny", out=tmp_path / "run", device="cpu", **settings)


def test_the_probe_takes_any_number_of_frames(tmp_path):
    """One more than whole parts of 512 left a part of one frame, which has no batch statistics."""
    data = write_store(tmp_path / "s.lewm", episodes=40, length=30)
    run = trainer._Run(data, "tiny", *lewm.config.configure("tiny", 2, {**TINY, "steps": 1}), device="cpu")
    run.data = Frames(data, [16] * 31 + [15, 2])
    with torch.no_grad():
        z, states = run._latents_and_states(np.arange(33), np.random.default_rng(0))
    assert z.shape == (513, 8)
    assert states.shape == (513, 2)


class Frames:
    """A data set as if its episodes had these lengths."""

    def __init__(self, data, lengths):
        self.frames, self.column, self.lengths = data.frames, data.column, np.array(lengths)


def test_training_leaves_the_global_generators_alone(store, tmp_path):
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002 (the legacy global state is what must not move)
    want = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    lewm.train(store, preset="tiny", out=tmp_path / "run", steps=3, device="cpu", **{**TINY, "dropout": 0.1})
    assert torch.equal(torch.rand(3), want[0])
    np.testing.assert_array_equal(np.random.rand(3), want[1])  # noqa: NPY002


def test_resume_refuses_another_run(store, tmp_path):
    arguments = {"preset": "tiny", "out": tmp_path / "run", "device": "cpu"}
    lewm.train(store, steps=5, **arguments, **TINY)
    with pytest.raises(ValueError, match="out must be a new or empty folder"):
        lewm.train(store, steps=5, **arguments, **TINY)
    with pytest.raises(ValueError, match="made with train learning_rate = 0.001, not 0.01"):
        lewm.train(store, steps=5, resume=True, learning_rate=0.01, **arguments, **TINY)
    other = write_store(tmp_path / "other.lewm", seed=1)
    with pytest.raises(ValueError, match="made with fingerprint"):
        lewm.train(other, steps=5, resume=True, **arguments, **TINY)
    with pytest.raises(FileNotFoundError, match="run to resume"):
        lewm.train(store, preset="tiny", out=tmp_path / "none", resume=True, device="cpu", steps=5, **TINY)
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="run to resume"):
        lewm.train(store, steps=5, resume=True, **arguments, **TINY)


def test_a_damaged_checkpoint_is_refused_by_name(store, tmp_path):
    arguments = {"preset": "tiny", "out": tmp_path / "run", "device": "cpu", "steps": 2, **TINY}
    lewm.train(store, **arguments)
    path = tmp_path / "run" / "checkpoint.safetensors"
    tensors, header = read_tensors(path, "a checkpoint")
    moment = "optimiser.0.exp_avg"
    for change, lost, text in (
        ({"step": None}, None, "step must be an integer"),
        ({"step": 3}, None, "step must be an integer of at least 0 and below 3"),
        ({"step": 0}, None, "unexpected .optimiser.0.exp_avg, "),
        ({"seconds": "long"}, None, "could not convert"),
        ({"metrics": {"loss": "low"}}, None, "must be real number"),
        ({}, moment, f"1 missing .{moment}"),
        ({}, "network.predictor.pos_embedding", "1 missing"),
    ):
        write_tensors(path, {k: v for k, v in tensors.items() if k != lost}, {**header, **change})
        with pytest.raises(ValueError, match=rf"run to resume: .*checkpoint\.safetensors is damaged .*{text}"):
            lewm.train(store, resume=True, **arguments)
    # Moments of another size than their parameter: the optimiser itself does not look.
    write_tensors(path, {**tensors, moment: tensors[moment].reshape(-1)[:1]}, header)
    with pytest.raises(ValueError, match=rf"1 of another shape .{moment}"):
        lewm.train(store, resume=True, **arguments)
    write_tensors(path, tensors, {**header, "identity": [1]})
    with pytest.raises(ValueError, match="was made with preset None"):
        lewm.train(store, resume=True, **arguments)


def test_collapse_is_warned_of_within_200_steps(store, tmp_path):
    with pytest.warns(trainer.CollapseWarning, match="latents are collapsing.*Raise sigreg_weight") as caught:
        lewm.train(store, preset="tiny", out=tmp_path / "run", steps=200, device="cpu", sigreg_weight=0.0, **TINY)
    assert len([w for w in caught if w.category is trainer.CollapseWarning]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", trainer.CollapseWarning)
        lewm.train(store, preset="tiny", out=tmp_path / "healthy", steps=160, device="cpu", sigreg_weight=0.1, **TINY)


def test_bad_data_is_refused_before_anything_is_written(tmp_path):
    constant = write_store(tmp_path / "c.lewm", action=lambda n: np.full((n, 2), 0.5, np.float32) * [1, 0])
    short = write_store(tmp_path / "s.lewm", length=10)
    few = write_store(tmp_path / "f.lewm", episodes=2, length=17)
    reversed_bounds = write_store(tmp_path / "r.lewm", high=-2)
    for data, text in (
        (reversed_bounds, r"stats\['low'\] must be below stats\['high'\]"),
        (constant, "constant"),
        (short, "long enough|at least 16 frames|16"),
        (few, "batch_size is 16, but there are only 2 windows"),
    ):
        with pytest.raises(ValueError, match=text):
            lewm.train(data, preset="tiny", out=tmp_path / "run", steps=5, device="cpu", **TINY)
    with pytest.raises(ValueError, match="frames must exceed history 4"):
        lewm.train(constant, preset="tiny", out=tmp_path / "run", history=4, device="cpu", **TINY)
    with pytest.raises(TypeError, match="is no setting of model or training"):
        lewm.train(constant, preset="tiny", out=tmp_path / "run", lr=1e-3, device="cpu")
    with pytest.raises(ValueError, match="checkpoint_every must be an integer of at least 1, got 0"):
        lewm.train(few, preset="tiny", out=tmp_path / "run", checkpoint_every=0, device="cpu")
    with pytest.raises(ValueError, match="device must be one that torch has here, got 'cudaa'"):
        lewm.train(few, preset="tiny", out=tmp_path / "run", device="cudaa")
    with pytest.raises(ValueError, match="seed must be"):
        lewm.train(constant, preset="tiny", out=tmp_path / "run", seed=-1, device="cpu")
    assert not (tmp_path / "run").exists()


def test_frames_of_another_size_are_resized(store, tmp_path):
    model = lewm.train(
        write_store(tmp_path / "large.lewm", size=32),
        preset="tiny",
        out=tmp_path / "run",
        steps=3,
        device="cpu",
        **TINY,
    )
    assert model.config.image_size == 16


@pytest.mark.parametrize(("schedule", "end"), [(1.0, 0.0), (10.0, 0.97)])
def test_the_learning_rate_warms_up_and_follows_its_cosine(store, tmp_path, schedule, end):
    run = trainer._Run(
        store, "tiny", *lewm.config.configure("tiny", 2, {**TINY, "steps": 100, "warmup": 0.1, "schedule": schedule}),
        device="cpu",
    )  # fmt: skip
    rates = [run._learning_rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-3)
    assert rates[100] / 1e-3 == pytest.approx(end, abs=0.02)


def test_every_epoch_is_a_permutation_of_the_windows(store, tmp_path):
    run = trainer._Run(store, "tiny", *lewm.config.configure("tiny", 2, {**TINY, "steps": 40}), device="cpu")
    seen = [actions.numpy() for _, actions in run._batches(0)]
    assert len(seen) == 40
    count = len(run.loader)
    assert 1 < count < 25
    epoch = np.concatenate(seen[:count])
    assert len(np.unique(epoch, axis=0)) == len(epoch) == count * 16, "no two windows have the same actions"
    np.testing.assert_array_equal(np.stack([actions for _, actions in run._batches(25)]), np.stack(seen[25:]))
    assert len(np.unique(np.concatenate(seen[: 2 * count]), axis=0)) > len(epoch)


# ------------------------------------------------------------------------------------------------ compiled training


@pytest.fixture
def dynamo(monkeypatch):
    """torch.compile without a code generator, and its counters, empty."""
    import torch._dynamo
    import torch._dynamo.utils

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(trainer, "_COMPILER", "aot_eager")
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def run_of(store, compile=False, seed=0, **settings):
    settings = {**TINY, "steps": 8, **settings}
    return trainer._Run(store, "tiny", *lewm.config.configure("tiny", 2, settings), seed, "cpu", compile)


def test_compiled_steps_are_eager_steps_in_one_graph_each(store, dynamo, monkeypatch):
    monkeypatch.setattr(trainer, "_bfloat16_is_native", lambda device: False)  # for a narrow tolerance
    eager, compiled = (run_of(store, compile, history=2, steps=40) for compile in (False, True))
    assert (eager.compiled, compiled.compiled) == (False, True)
    assert list(compiled.network.state_dict()) == list(eager.network.state_dict())
    for name, value in eager.network.state_dict().items():
        assert torch.equal(compiled.network.state_dict()[name], value), f"{name}: compiling left a trace"
    assert all(parameter.grad is None for parameter in compiled.network.parameters())
    seen = []
    for frames, actions in eager._batches(0, 6):
        if eager.step == 3:  # other modes, and BatchNorm without its running statistics, in between
            for run in (eager, compiled):
                run._inspect()
        losses = []
        for run in (eager, compiled):
            run.network.train()
            losses.append(run._gradients(frames, actions))
            run.step += 1
        for name in ("loss", "prediction", "sigreg", "z"):
            torch.testing.assert_close(losses[1][name], losses[0][name], rtol=1e-4, atol=1e-5)
        for (name, a), b in zip(eager.network.named_parameters(), compiled.network.parameters(), strict=True):
            assert (a.grad - b.grad).norm() <= 1e-4 * a.grad.norm() + 1e-6, name
        eager.optimiser.step()
        with torch.no_grad():
            # AdamW makes whole steps of roundings where the gradient is 0, as that of a bias before BatchNorm.
            for a, b in zip(eager.network.parameters(), compiled.network.parameters(), strict=True):
                b.copy_(a)
        for run in (eager, compiled):
            run.optimiser.zero_grad(set_to_none=True)
        seen.append(dynamo["stats"]["unique_graphs"])
    for (name, a), b in zip(eager.network.named_buffers(), compiled.network.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert seen == [2] * 6, "one of the encoder and one of the predictor, from the first step on"
    assert not dynamo["graph_break"]


def test_a_compiled_run_resumes_as_the_same_run_and_its_model_is_as_any(store, tmp_path, dynamo):
    arguments = {"preset": "tiny", "device": "cpu", "compile": True, "steps": 12, "dropout": 0.1, **TINY}
    whole = lewm.train(store, out=tmp_path / "whole", **arguments)

    def interrupt(done, total, metrics):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lewm.train(store, out=tmp_path / "cut", progress=interrupt, **arguments)
    resumed = lewm.train(store, out=tmp_path / "cut", resume=True, **arguments)
    assert resumed.hash() == whole.hash()
    assert [strip(r) for r in rows(tmp_path / "cut")] == [strip(r) for r in rows(tmp_path / "whole")]
    assert dynamo["stats"]["unique_graphs"] == 2, "three runs, one pair of graphs"
    assert whole.meta["training"]["compiled"] is True
    eager = lewm.train(store, out=tmp_path / "eager", **{**arguments, "compile": False})
    for name in ("checkpoint", "model"):
        tensors = [set(read_tensors(tmp_path / run / f"{name}.safetensors", "it")[0]) for run in ("whole", "eager")]
        assert tensors[0] == tensors[1]
    assert eager.meta["training"]["compiled"] is False


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_compiler_that_fails_is_warned_of_and_done_without(store, dynamo, monkeypatch, where):
    from torch._dynamo.backends.common import aot_autograd

    def fail(graph, inputs):
        raise RuntimeError("no C compiler here\nand a long story")

    backend = fail if where == "forward" else aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=fail)
    monkeypatch.setattr(trainer, "_COMPILER", backend)
    with pytest.warns(
        UserWarning, match=r"training goes on without torch.compile, (.|\n)*no C compiler here"
    ) as caught:
        failed = run_of(store, compile=True)
    assert len([w for w in caught if "torch.compile" in str(w.message)]) == 1
    assert not failed.compiled
    plain = run_of(store)
    for batch in plain._batches(0, 3):
        losses = [run._step(*batch) for run in (failed, plain)]
        assert losses[0]["loss"] == losses[1]["loss"]
        assert torch.equal(losses[0]["z"], losses[1]["z"])
    for a, b in zip(failed.network.state_dict().values(), plain.network.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_compile_is_off_on_a_cpu_and_checked(store):
    assert not run_of(store, None).compiled
    with pytest.raises(ValueError, match="compile must be True, False or None, got 'yes'"):
        run_of(store, "yes")


# ------------------------------------------------------------------------------------------------ training on CUDA


def test_a_step_on_cuda_never_looks_at_the_device(store, monkeypatch):
    """As fake tensors, which have shapes, devices and no values: reading one is an error, crossing over is seen."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Spy(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen, self.crossing = set(), []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.seen.add(str(function).split(".")[1])
            devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
            if devices - {"cuda"}:
                self.crossing.append(str(function))
            return out

    def network(config):
        with torch.device("cuda"):
            made = lewm.network.LeWM(config)
        made.to = lambda device: made
        return made

    def backward(loss):  # needs a real device's thread; its kernels are torch's and those of `lewm.kernels`
        for parameter in run.network.parameters():
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(trainer, "LeWM", network)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, std: tensor)  # reads values
    monkeypatch.setattr(trainer, "_bfloat16_is_native", lambda device: True)
    monkeypatch.setattr(trainer, "_generator", lambda device: torch.Generator())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    # Drawn on the host and copied: the one thing that waits, until the kernel draws them itself.
    monkeypatch.setattr(
        trainer, "sigreg_directions", lambda dim, count, **_: torch.ones(dim, count, device="cuda"), raising=False
    )
    with FakeTensorMode():
        settings = {**TINY, "history": 2, "dropout": 0.1}
        run = trainer._Run(store, "tiny", *lewm.config.configure("tiny", 2, settings), device="cuda", compile=False)
        frames = torch.zeros(16, 4, 16, 16, 3, dtype=torch.uint8, device="cuda")
        actions = torch.zeros(16, 3, 10, device="cuda")
        for _ in range(2):
            with warnings.catch_warnings(), Spy() as spy:
                warnings.simplefilter("ignore")  # autocast wants a real device
                losses = run._step(frames, actions)
            assert not spy.crossing
            assert {"native_dropout", "_fused_adamw_"} <= spy.seen
            assert any(name.startswith("sigreg") for name in spy.seen), "the fused kernel"
        assert all(value.device.type == "cuda" for value in losses.values())
        with pytest.raises(Exception, match="_local_scalar_dense"):
            float(losses["loss"])  # which is to say that the test would have seen it


def test_batches_are_copied_ahead_on_a_stream_of_their_own(store, monkeypatch):
    """What is asked of CUDA, in its order: the copies, then the event, both on the side stream; the step's stream
    waits for the event, and the copies' memory is marked as in use there."""
    log = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            log.append(("event", self.name))
            return f"event of {self.name}"

        def wait_event(self, event):
            log.append(("wait", self.name, event))

    current = [Stream("main")]

    class Within:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            current.append(self.stream)

        def __exit__(self, *_):
            current.pop()

    class Pinned(torch.Tensor):
        def pin_memory(self):
            log.append(("pin", current[-1].name))
            return self

        def to(self, device, non_blocking=False):
            log.append(("copy", current[-1].name, non_blocking))
            return self

        def record_stream(self, stream):
            log.append(("in use", stream.name))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", Within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    upload = trainer._Upload(torch.device("cuda"))
    batch = tuple(torch.zeros(2).as_subclass(Pinned) for _ in range(2))
    sent = upload.send(*batch)
    copies = [("pin", "side"), ("copy", "side", True)]
    assert log == [*copies, *copies, ("event", "side")]
    log.clear()
    got = upload.receive(sent)
    assert log == [("wait", "main", "event of side"), ("in use", "main"), ("in use", "main")]
    assert all(a is b for a, b in zip(got, batch, strict=True))


def test_every_batch_that_a_run_computes_with_has_been_received(store, monkeypatch):
    """Training's and those of the last pass over BatchNorm's statistics: none is used before its copy is there."""
    run = run_of(store, steps=3)
    received, used = [], []
    receive, losses = run._upload.receive, run._losses
    monkeypatch.setattr(run._upload, "receive", lambda sent: received.append(receive(sent)) or received[-1])
    monkeypatch.setattr(run, "_losses", lambda *batch: used.append(batch) or losses(*batch))
    for batch in run._batches(0):
        run._step(*batch)
    run._precise_batchnorm()
    assert len(used) > 3
    assert all(a[0] is b[0] and a[1] is b[1] for a, b in zip(used, received, strict=True))


def test_a_key_is_for_one_generator_and_for_a_while():
    generator, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    torch.manual_seed(5)
    want = torch.rand(3), torch.rand(3, generator=other)
    torch.manual_seed(5)
    drawn = []

    def draw():
        with trainer._keyed(generator, 9):
            drawn.append(torch.rand(3, generator=generator))
            raise KeyError

    with pytest.raises(KeyError):
        draw()
    assert torch.equal(drawn[0], torch.rand(3, generator=torch.Generator().manual_seed(9)))
    assert torch.equal(torch.rand(3), want[0]), "the global one was not touched"
    assert torch.equal(torch.rand(3, generator=generator), want[1]), "and this one went on where it was"


def test_a_checkpoint_is_never_of_a_network_that_is_lost(tmp_path):
    """Not even where Ctrl-C comes before the loss was next looked at, or where no probe makes a checkpoint log."""
    data = write_store(tmp_path / "s.lewm")
    arguments = {"preset": "tiny", "device": "cpu", "checkpoint_every": 7, "steps": 60, **TINY}

    def lose(done, total, metrics):
        if done == 9:
            raise KeyboardInterrupt

    settings = {"learning_rate": 1e30, "clip": 1e30, "warmup": 0.9}
    for out, more in ((tmp_path / "a", {"progress": lose, "checkpoint_every": 50}), (tmp_path / "b", {})):
        with pytest.raises(FloatingPointError, match="the last checkpoint in .* is intact"):
            lewm.train(data, out=out, **{**arguments, **settings, **more})
        tensors, _ = read_tensors(out / "checkpoint.safetensors", "a checkpoint")
        assert all(np.isfinite(value).all() for value in tensors.values())


@pytest.mark.gpu
def test_a_step_on_a_gpu_never_waits(store):
    """Torch's own watch over what synchronises. The first steps allocate, load libraries and compile."""
    settings = {**TINY, "steps": 40, "history": 2, "dropout": 0.1}
    for compiled in (False, True):
        run = trainer._Run(store, "tiny", *lewm.config.configure("tiny", 2, settings), 0, "cuda", compiled)
        batches = run._batches(0)
        for number, batch in enumerate(batches):
            torch.cuda.set_sync_debug_mode("error" if number >= 3 else "default")
            try:
                losses = run._step(*batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            run.step += 1
        assert np.isfinite(float(losses["loss"]))


@pytest.mark.gpu
def test_training_on_a_gpu_is_training_on_a_cpu(store, tmp_path):
    """In bfloat16 both, from the same seed: the losses agree to its rounding, compiled or not."""
    settings = {"preset": "tiny", "steps": 40, **TINY}
    lewm.train(store, out=tmp_path / "cpu", device="cpu", **settings)
    for name, compiled in (("eager", False), ("compiled", True)):
        model = lewm.train(store, out=tmp_path / name, device="cuda", compile=compiled, **settings)
        assert model.meta["training"]["compiled"] is compiled
        for ours, theirs in zip(rows(tmp_path / name), rows(tmp_path / "cpu"), strict=True):
            assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=0.05)
