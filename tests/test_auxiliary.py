"""Loss terms beside the paper's two, and other targets: their formulas, that they train, resume, and leave nothing
behind when they are off."""

import csv
import math
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.test_trainer import TINY, write_store

import lewm
from lewm import trainer
from lewm.auxiliary import Auxiliary, Average, Decoder, decorrelation, hinge
from lewm.config import TERMS, configure
from lewm.model_file import read_tensors, write_tensors
from lewm.pixels import MEAN, STD


def auxiliary(**settings):
    torch.manual_seed(0)
    return Auxiliary(*configure("tiny", 2, {**TINY, **settings}))


def inputs(dtype=torch.float32, frames=4):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, frames, 8, generator=generator, dtype=dtype)
    pictures = torch.randint(0, 256, (3, frames, 16, 16, 3), generator=generator, dtype=torch.uint8)
    return z, pictures, torch.randn(3, frames - 1, 10, generator=generator, dtype=dtype)


def test_terms_that_are_off_have_no_parameters_and_no_loss():
    both_off = auxiliary()
    assert not list(both_off.parameters())
    assert both_off(*inputs()) == {}
    assert list(auxiliary(reconstruction=0.5)(*inputs())) == ["reconstruction"]
    assert list(auxiliary(inverse_dynamics=0.5)(*inputs())) == ["inverse_dynamics"]


@pytest.mark.parametrize("frames", [2, 4])
def test_the_terms_are_mean_squared_errors(frames):
    terms = auxiliary(inverse_dynamics=1.0, reconstruction=1.0)
    z, pictures, actions = inputs(frames=frames)
    found = terms(z, pictures, actions)
    errors = [
        terms.inverse_dynamics(torch.cat([z[b, t], z[b, t + 1]])) - actions[b, t]
        for b in range(3) for t in range(frames - 1)
    ]  # fmt: skip
    torch.testing.assert_close(found["inverse_dynamics"], torch.stack(errors).square().mean())
    errors = [
        terms.reconstruction(z[b, t][None])[0, c] - (pictures[b, t, ..., c] / 255 - MEAN[c]) / STD[c]
        for b in range(3) for t in (0, frames - 1) for c in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(found["reconstruction"], torch.stack(errors).square().mean())


def test_both_terms_have_the_gradients_of_their_values():
    terms = auxiliary(inverse_dynamics=1.0, reconstruction=1.0, head_hidden=8).double()
    z, pictures, actions = inputs(torch.float64)

    def weighted(z):
        losses = terms(z, pictures, actions)
        return losses["inverse_dynamics"] + losses["reconstruction"]

    # A sum in float32 within: what is compared is a directional derivative.
    z.requires_grad_(True)
    (gradient,) = torch.autograd.grad(weighted(z), z)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=z.dtype)
    with torch.no_grad():
        numeric = (weighted(z + 1e-2 * direction) - weighted(z - 1e-2 * direction)) / 2e-2
    assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=2e-3)


@pytest.mark.parametrize("size", [8, 16, 21, 36, 64, 96, 224])
def test_a_decoder_paints_pictures_of_any_size(size):
    assert Decoder(5, size)(torch.zeros(2, 5)).shape == (2, 3, size, size)


def test_actions_that_latents_tell_are_learnt():
    terms = auxiliary(inverse_dynamics=1.0)
    optimiser = torch.optim.AdamW(terms.parameters(), 3e-3)
    z, pictures, _ = inputs()
    actions = (z[:, 1:] - z[:, :-1]).repeat(1, 1, 2)[..., :10]
    losses = []
    for _ in range(100):
        losses.append(terms(z, pictures, actions)["inverse_dynamics"])
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1].item() < 0.1 * losses[0].item()


def test_a_run_with_both_terms_lowers_them_resumes_and_saves_the_model_alone(tmp_path):
    store = write_store(tmp_path / "square.lewm")
    settings = {**TINY, "steps": 80, "inverse_dynamics": 0.5, "reconstruction": 0.5}
    arguments = {"preset": "tiny", "device": "cpu", "checkpoint_every": 20, **settings}
    whole = lewm.train(store, out=tmp_path / "whole", **arguments)
    with (tmp_path / "whole" / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert float(table[-1]["reconstruction"]) < 0.9 * float(table[0]["reconstruction"])
    assert 0 < float(table[-1]["inverse_dynamics"]) < 2
    tensors, _ = read_tensors(tmp_path / "whole" / "model.safetensors", "model")
    plain = lewm.train(store, preset="tiny", out=tmp_path / "plain", device="cpu", **{**TINY, "steps": 1})
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in read(tmp_path / "plain").items()}
    assert plain.config == whole.config

    def interrupt(done, total, metrics):
        if done == 47:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lewm.train(store, out=tmp_path / "cut", progress=interrupt, **arguments)
    assert lewm.train(store, out=tmp_path / "cut", resume=True, **arguments).hash() == whole.hash()


def read(folder):
    return read_tensors(folder / "model.safetensors", "model")[0]


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, "much"])
def test_a_weight_is_a_number_that_is_not_negative(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        configure("tiny", 2, {name: value})


def test_gradients_reach_the_latents_of_every_frame_that_a_term_sees():
    z, pictures, actions = inputs()
    z.requires_grad_(True)
    terms = auxiliary(inverse_dynamics=1.0, reconstruction=1.0)
    losses = terms(z, pictures, actions)
    (by_actions,) = torch.autograd.grad(losses["inverse_dynamics"], z, retain_graph=True)
    (by_pictures,) = torch.autograd.grad(losses["reconstruction"], z)
    assert (np.abs(by_actions.numpy()).sum((0, 2)) > 0).all()
    assert ((np.abs(by_pictures.numpy()).sum((0, 2)) > 0) == [True, False, False, True]).all()


# --------------------------------------------------------------------------------------------------- PLDM's terms

OF_LATENTS = ("variance", "covariance", "time_similarity", "time_variance", "time_covariance")
PLDM = {"sigreg_weight": 0.0, "variance": 18.0, "covariance": 12.0, "time_similarity": 0.2, "time_variance": 0.7}
# 2 samples, 1 dimension, primes, and more dimensions than samples.
SHAPES = [(2, 4, 1), (2, 2, 3), (7, 3, 5), (64, 4, 32), (3, 5, 17)]


def by_loops(name, z):
    """The term in plain Python, float64 numbers one by one."""
    B, T, D = z.shape

    def deviation_falls_short(values):
        mean = math.fsum(values) / len(values)
        variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
        return max(0.0, 1 - math.sqrt(variance + 1e-4))

    def covariances(rows):
        """Sum of the squares off the diagonal, over D."""
        means = [math.fsum(row[d] for row in rows) / len(rows) for d in range(D)]
        total = 0.0
        for i in range(D):
            for j in range(D):
                if i != j:
                    entry = math.fsum((row[i] - means[i]) * (row[j] - means[j]) for row in rows) / (len(rows) - 1)
                    total += entry**2
        return total / D

    batches, windows = [z[:, t].tolist() for t in range(T)], z.tolist()
    if name == "time_similarity":
        steps = [(z[b, t, d] - z[b, t + 1, d]) ** 2 for b in range(B) for t in range(T - 1) for d in range(D)]
        return math.fsum(steps) / len(steps)
    groups = windows if name.startswith("time_") else batches
    if name.endswith("covariance"):
        return math.fsum(map(covariances, groups)) / len(groups)
    short = [deviation_falls_short([row[d] for row in rows]) for rows in groups for d in range(D)]
    return math.fsum(short) / len(short)


@pytest.mark.parametrize("name", OF_LATENTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pldms_terms_are_their_formulas(name, shape):
    z = np.random.default_rng(0).normal(0.3, 0.8, shape)  # deviations on both sides of the hinge
    terms = auxiliary(**{name: 1.0})
    assert not list(terms.parameters())
    want = by_loops(name, z)
    exact = terms(torch.from_numpy(z), None, None)
    assert list(exact) == [name]
    assert exact[name].dtype == torch.float64
    assert float(exact[name]) == pytest.approx(want, rel=1e-12)
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        found = terms(torch.from_numpy(z).float(), None, None)[name]
    assert float(found) == pytest.approx(want, rel=1e-5, abs=1e-7)  # float32, whatever is on around it
    if shape[2] == 1 and name.endswith("covariance"):
        assert want == 0


@pytest.mark.parametrize("name", OF_LATENTS)
@pytest.mark.parametrize("shape", [(2, 2, 1), (3, 4, 2), (5, 3, 7)], ids=str)
def test_pldms_terms_have_the_gradients_of_their_values(name, shape):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    terms = auxiliary(**{name: 1.0})
    assert torch.autograd.gradcheck(lambda z: terms(z, None, None)[name], z)


def test_latents_that_are_all_the_same_have_finite_gradients():
    """What the term under the root is for: a collapsed batch is when the hinge has to work."""
    terms = auxiliary(**dict.fromkeys(OF_LATENTS, 1.0))
    z = torch.full((4, 3, 5), 0.7, requires_grad=True)
    found = terms(z, None, None)
    want = [0.99, 0, 0, 0.99, 0]
    np.testing.assert_allclose([found[name].item() for name in OF_LATENTS], want, rtol=1e-6)
    sum(found.values()).backward()
    assert torch.isfinite(z.grad).all()


def test_what_the_terms_ask_for_has_no_loss():
    spread = torch.tensor([[[3.0, -3.0], [-3.0, -3.0], [3.0, 3.0], [-3.0, 3.0]]])
    assert float(hinge(spread)) == 0
    assert float(decorrelation(spread)) == 0
    assert float(decorrelation(spread[:, :, :1].expand(-1, -1, 2))) == pytest.approx(12.0**2)


def loss_of(store, actions_of=None, **settings):
    """A run's losses and the gradients of its parameters at its first step."""
    model, config = configure("tiny", store.action_dim, {**TINY, "steps": 4, **settings})
    run = trainer._Run(store, "tiny", model, config, 0, "cpu")
    frames, actions = next(run._batches(0))
    run.network.train()
    losses = run._gradients(frames, actions)
    return run, losses, {name: p.grad for name, p in run.network.named_parameters()}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "square.lewm")


def test_the_loss_is_the_weighted_sum_of_pldms_seven(store):
    weights = {**{name: 0.5 + i for i, name in enumerate(OF_LATENTS)}, "inverse_dynamics": 0.3}
    _, losses, _ = loss_of(store, sigreg_weight=0.0, **weights)
    want = losses["prediction"] + sum(weight * losses[name] for name, weight in weights.items())
    torch.testing.assert_close(losses["loss"], want)
    for name in OF_LATENTS:
        assert float(losses[name]) == pytest.approx(by_loops(name, losses["z"].double().numpy()), rel=1e-4, abs=1e-6)


def test_sigreg_without_a_weight_is_logged_and_never_differentiated(store, monkeypatch):
    seen, whole = [], trainer.sigreg

    def noted(z, directions):
        seen.append(whole(z, directions))
        return seen[-1]

    monkeypatch.setattr(trainer, "sigreg", noted)
    _, losses, plain = loss_of(store, sigreg_weight=0.0)
    assert not seen[-1].requires_grad
    assert losses["sigreg"] == seen[-1] > 0
    assert losses["loss"] == losses["prediction"]
    _, _, weighted = loss_of(store, sigreg_weight=0.1)
    assert seen[-1].requires_grad
    assert any(not torch.equal(plain[name], weighted[name]) for name in plain if plain[name] is not None)


def test_pldm_keeps_latents_apart_where_no_regulariser_does_not(store, tmp_path):
    """200 steps of each: the one has a full deviation in every dimension, the other warns."""
    arguments = {"preset": "tiny", "device": "cpu", **TINY, "steps": 200}
    with pytest.warns(lewm.trainer.CollapseWarning, match="sigreg_weight, now 0: no term keeps latents apart"):
        lewm.train(store, out=tmp_path / "none", sigreg_weight=0.0, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error", trainer.CollapseWarning)
        lewm.train(store, out=tmp_path / "pldm", **arguments, **PLDM)
    collapsed, apart = (last_row(tmp_path / name) for name in ("none", "pldm"))
    assert float(collapsed["embedding_std"]) < 0.1 < 0.7 < float(apart["embedding_std"])
    assert float(apart["effective_rank"]) > 3
    assert float(collapsed["sigreg_per_sample"]) > 0.2
    assert float(apart["variance"]) < 0.3
    assert "variance" not in collapsed


def test_the_warning_names_what_a_run_can_raise(store):
    """And goes by the spread of latents where SIGReg, which also wants their mean at 0, is no term."""
    healthy = {"sigreg_per_sample": 2.0, "embedding_std": 1.0, "effective_rank": 3.0}
    for settings, row, text in (
        ({"sigreg_weight": 0.5}, healthy, r"sigreg / batch 2\.000 .*Raise sigreg_weight, now 0\.5\."),
        ({"sigreg_weight": 0.0, "covariance": 2.0}, healthy, None),
        (
            {"sigreg_weight": 0.0, "covariance": 2.0},
            {"effective_rank": 1.1},
            "Raise variance, now 0, or covariance, now 2",
        ),
        ({"sigreg_weight": 0.0}, healthy, None),
        ({"sigreg_weight": 0.0}, {"embedding_std": 0.01}, "Raise sigreg_weight, now 0: no term keeps latents apart"),
    ):
        run, *_ = loss_of(store, **settings)
        run.step = 150
        if text is None:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                run._warn_of_collapse({**healthy, **row})
            continue
        with pytest.warns(trainer.CollapseWarning, match=text):
            run._warn_of_collapse({**healthy, **row})


def last_row(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))[-1]


# ------------------------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize("settings", [{}, {"action_prefix": True, "prefix_blocks": 2, "frames": 4}], ids=str)
def test_no_gradient_flows_into_a_target(store, settings):
    """Nor is one optimised. With both encoders the same, both targets give the same gradients, and others than none."""
    gradients = {}
    for target in ("online", "stop_gradient", "ema"):
        run, losses, grads = loss_of(store, sigreg_weight=0.0, target=target, **settings)
        gradients[target] = torch.cat([g.flatten() for name, g in grads.items() if name.startswith("projector")])
        assert losses["prediction"] > 0
        assert all(p.grad is None and not p.requires_grad for p in run.average.parameters())
        assert len(list(run.average.parameters())) == (target == "ema") * len(
            [*run.network.encoder.parameters(), *run.network.projector.parameters()]
        )
        optimised = {id(p) for group in run.optimiser.param_groups for p in group["params"]}
        assert not optimised & {id(p) for p in run.average.parameters()}
    # Before the first step the average is the encoder itself.
    torch.testing.assert_close(gradients["ema"], gradients["stop_gradient"], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(gradients["online"], gradients["stop_gradient"], rtol=1e-2)


def test_stop_gradient_predicts_the_latents_as_they_are(store):
    """Its loss is the paper's; its gradient that of predictions alone, against a copy of the latents."""
    _, online, _ = loss_of(store, sigreg_weight=0.0)
    run, stopped, _ = loss_of(store, sigreg_weight=0.0, target="stop_gradient")
    assert online["loss"] == stopped["loss"]
    z = torch.randn(2, 4, 8, requires_grad=True)
    actions = torch.randn(2, 3, 10)
    run.network.eval()
    (gradient,) = torch.autograd.grad(trainer._predict(run.network, z, actions, z.detach()), z)
    assert (gradient[:, -1] == 0).all()  # the last latent predicts nothing, with a history of 1
    assert (gradient[:, :-1] != 0).any()


def test_an_average_follows_at_its_decay(store):
    run, *_ = loss_of(store, target="ema", ema_decay=0.75)
    own = {name: value.clone() for name, value in run.average.named_parameters()}
    with torch.no_grad():
        for parameter in run.network.parameters():
            parameter.add_(torch.randn_like(parameter))
    run.average.follow(run.network, 0.75)
    online = dict(run.network.named_parameters())
    for name, value in run.average.named_parameters():
        torch.testing.assert_close(value, 0.75 * own[name] + 0.25 * online[name])


def test_an_average_encodes_as_its_network(store):
    run, *_ = loss_of(store, target="ema")
    average = Average(run.network)
    frames = torch.from_numpy(np.asarray(store[0].frames[:5]))
    for mode in (True, False):
        average.train(mode), run.network.train(mode)
        with torch.no_grad():
            assert torch.equal(average.encode(frames), run.network.encode(frames))


@pytest.mark.parametrize("target", ["stop_gradient", "ema"])
def test_a_run_with_another_target_resumes_bit_for_bit_and_saves_the_model_alone(store, tmp_path, target):
    settings = {**TINY, "steps": 30, "target": target, "ema_decay": 0.9, "dropout": 0.1}
    arguments = {"preset": "tiny", "device": "cpu", "checkpoint_every": 10, **settings}
    whole = lewm.train(store, out=tmp_path / "whole", **arguments)

    def interrupt(done, total, metrics):
        if done == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lewm.train(store, out=tmp_path / "cut", progress=interrupt, **arguments)
    assert lewm.train(store, out=tmp_path / "cut", resume=True, **arguments).hash() == whole.hash()
    rows = []
    for name in ("cut", "whole"):
        with (tmp_path / name / "metrics.csv").open() as file:
            rows.append([{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)])
    assert rows[0] == rows[1]
    cut, whole_state = (read_tensors(tmp_path / name / "checkpoint.safetensors", "run")[0] for name in ("cut", "whole"))
    averaged = [name for name in whole_state if name.startswith("average.")]
    assert bool(averaged) == (target == "ema")
    for name, value in whole_state.items():
        np.testing.assert_array_equal(value, cut[name], err_msg=name)
    assert any("running_mean" in name for name in averaged) == (target == "ema")
    if target == "ema":
        # It lags behind, and its statistics are its own.
        assert not np.array_equal(
            whole_state["average.projector.net.0.weight"], whole_state["network.projector.net.0.weight"]
        )
    plain = lewm.train(store, preset="tiny", out=tmp_path / "plain", device="cpu", **{**TINY, "steps": 1})
    assert read(tmp_path / "whole").keys() == read(tmp_path / "plain").keys()
    assert whole.config.history == plain.config.history


def test_a_damaged_average_is_refused(store, tmp_path):
    arguments = {"preset": "tiny", "device": "cpu", "out": tmp_path / "run", **{**TINY, "steps": 2}, "target": "ema"}
    lewm.train(store, **arguments)
    path = tmp_path / "run" / "checkpoint.safetensors"
    tensors, header = read_tensors(path, "run")
    lost = next(name for name in tensors if name.startswith("average."))
    write_tensors(path, {k: v for k, v in tensors.items() if k != lost}, header)
    with pytest.raises(ValueError, match="run to resume: .* is damaged .*1 missing .average"):
        lewm.train(store, resume=True, **arguments)


def test_a_checkpoint_of_an_older_release_lacks_what_is_off(store, tmp_path):
    arguments = {"preset": "tiny", "device": "cpu", "out": tmp_path / "run", **{**TINY, "steps": 2}}
    model = lewm.train(store, **arguments)
    path = tmp_path / "run" / "checkpoint.safetensors"
    tensors, header = read_tensors(path, "run")
    for name in (*OF_LATENTS, "target", "ema_decay"):
        del header["identity"]["train"][name]
    write_tensors(path, tensors, header)
    assert lewm.train(store, resume=True, **arguments).hash() == model.hash()
    with pytest.raises(ValueError, match="variance = 0.0, not 1.0"):
        lewm.train(store, resume=True, variance=1.0, **arguments)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"target": "momentum"}, "target must be one of online, stop_gradient, ema, got 'momentum'"),
        ({"target": True}, "target must be one of"),
        ({"target": ["ema"]}, "target must be one of"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"ema_decay": -0.1}, "ema_decay must be in"),
        ({"ema_decay": float("nan")}, "ema_decay must be in"),
        ({"ema_decay": "slow"}, "ema_decay must be a number, got 'slow'"),
    ],
)
def test_targets_that_are_none(settings, text):
    with pytest.raises(ValueError, match=text):
        configure("tiny", 2, settings)
