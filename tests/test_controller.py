import threading

import numpy as np
import pytest

from fake_models import PointModel
from lewm.controller import Controller
from lewm.planner import CEM, ICEM, MPPI, plan, plan_latents

SMALL = CEM(samples=32, iterations=4, elites=6, horizon=3)
GOAL = np.array([2.0, -1.0])


def frames(model, n, seed=0):
    positions = np.random.default_rng(seed).integers(-50, 50, (n, model.config.embed_dim)) / 10
    return np.stack([model.picture(p) for p in positions])


def run(controller, obs):
    return np.stack([controller(frame) for frame in obs])


def test_it_reaches_the_goal():
    model, position = PointModel(), np.array([-2.0, 2.0])
    controller = Controller(model, model.picture(GOAL), planner=CEM(horizon=3), execute=1)
    for _ in range(12):
        position = position + controller(model.picture(position))
    assert np.abs(position - GOAL).max() < 0.3


def test_it_executes_whole_plans_by_default():
    model = PointModel()
    obs = frames(model, 12)
    controller = Controller(model, GOAL, planner=SMALL, seed=5, env_id=9)
    assert controller.plan is None
    actions = run(controller, obs)
    for k in (0, 1):
        want = plan(obs[6 * k], GOAL, model=model, planner=SMALL, seed=5, env_ids=[9], plan_index=k)
        np.testing.assert_array_equal(actions[6 * k : 6 * k + 6], want.actions)
    np.testing.assert_array_equal(controller.plan.actions, want.actions)
    assert controller.plan.cost == want.cost
    assert controller.plan.imagined is None


@pytest.mark.parametrize("execute", [1, 2])
def test_it_replans_after_the_blocks_to_execute_from_the_shifted_mean(execute):
    model = PointModel()
    obs = frames(model, 8)
    controller = Controller(model, GOAL, planner=SMALL, execute=execute)
    actions, init = run(controller, obs), None
    for plans, step in enumerate(range(0, 8, 2 * execute)):
        want = plan(obs[step], GOAL, model=model, planner=SMALL, plan_index=plans, init=init)
        np.testing.assert_array_equal(actions[step : step + 2 * execute], want.actions[: 2 * execute])
        init = np.concatenate([want.mean[execute:], np.zeros((execute, 4))])


@pytest.mark.parametrize(("execute", "horizons"), [(1, [3, 2, 1, 3, 2]), (2, [3, 1, 3, 1]), (3, [3, 3, 3])])
@pytest.mark.parametrize("kind", [CEM, ICEM])
def test_a_shrinking_horizon_ends_when_the_first_plan_did(kind, execute, horizons):
    model, settings = PointModel(), {"samples": 32, "iterations": 4, "elites": 6}
    controller = Controller(model, GOAL, planner=kind(**settings, horizon=3), execute=execute, shrink=True)
    found, actions = [], []
    for frame in frames(model, 2 * sum(min(execute, horizon) for horizon in horizons)):
        before = controller.plan
        actions.append(controller(frame))
        if controller.plan is not before:
            found.append((frame, controller.plan))
    assert [len(made.actions) // 2 for _, made in found] == horizons
    if kind is CEM:
        init, done = None, 0
        for index, (frame, made) in enumerate(found):
            planner = CEM(**settings, horizon=horizons[index])
            want = plan(frame, GOAL, model=model, planner=planner, plan_index=index, init=init)
            np.testing.assert_array_equal(made.actions, want.actions)
            now = min(execute, horizons[index])
            np.testing.assert_array_equal(actions[2 * done : 2 * (done + now)], want.actions[: 2 * now])
            done, rest = done + now, want.mean[execute:]
            init = rest if len(rest) else None


def test_icem_scores_the_rests_of_its_elites_again():
    model, planner = PointModel(), ICEM(samples=32, iterations=4, elites=10, horizon=3)
    obs = frames(model, 4)
    controller = Controller(model, GOAL, planner=planner, execute=1)
    actions = [controller(frame) for frame in obs[:2]]
    before = controller.plan
    actions += [controller(frame) for frame in obs[2:]]
    kept = np.concatenate([before.kept[:, 1:], np.zeros((3, 1, 4))], axis=1)
    np.testing.assert_array_equal(model.asked[5][1][0, -3:], kept)
    init = np.concatenate([before.mean[1:], np.zeros((1, 4))])
    z = model.encode(obs[2:3])[:, None]
    want = plan_latents(model, z, GOAL[None], planner, env_ids=[0], plan_index=1, init=init, kept=kept[None])
    np.testing.assert_array_equal(np.stack(actions[2:]), want.actions[0, :2])


@pytest.mark.parametrize("kind", [ICEM, MPPI])
def test_a_reset_clears_what_a_planner_keeps(kind):
    model = PointModel()
    obs = frames(model, 8)
    controller = Controller(model, GOAL, planner=kind(samples=32, iterations=3, elites=10, horizon=3), execute=1)
    first = run(controller, obs)
    controller.reset()
    np.testing.assert_array_equal(run(controller, obs), first)


def test_without_warm_start_every_search_begins_at_the_mean_action():
    model = PointModel()
    controller = Controller(model, GOAL, planner=SMALL, execute=1, warm_start=False)
    run(controller, frames(model, 3))
    np.testing.assert_array_equal(model.asked[-5][1][0, 0], np.zeros((3, 4)))


def test_history_grows_and_then_slides():
    model = PointModel(history=3)
    obs = frames(model, 10)
    controller = Controller(model, GOAL, planner=SMALL, execute=1)
    model.encoded.clear()
    actions = run(controller, obs)
    assert [name for name, _ in model.encoded] == ["obs"] * 5  # each frame at a block boundary once, no other frame
    asked = model.asked[:: SMALL.iterations + 1]
    latents, blocks = model.encode(obs[::2]), model.normalise(actions.reshape(5, 4))
    assert len(asked) == 5
    for k, (z, _, past) in enumerate(asked):
        first = max(0, k - 2)
        np.testing.assert_array_equal(z[0], latents[first : k + 1])
        if k == 0:
            assert past is None
        else:
            np.testing.assert_array_equal(past[0], blocks[first:k])


def test_history_holds_every_boundary_also_within_a_plan():
    model = PointModel(history=3)
    obs = frames(model, 7)
    actions = run(Controller(model, GOAL, planner=SMALL), obs)
    z, _, past = model.asked[SMALL.iterations + 1]
    np.testing.assert_array_equal(z[0], model.encode(obs[[2, 4, 6]]))
    np.testing.assert_array_equal(past[0], model.normalise(actions[2:6].reshape(2, 4)))
    want = plan(
        obs[[2, 4, 6]], GOAL, model=model, planner=SMALL, plan_index=1, past_actions=actions[2:6].reshape(2, 2, 2)
    )
    np.testing.assert_array_equal(actions[6], want.action)


def test_the_action_really_executed_enters_the_history():
    model = PointModel(history=2)
    obs, really = frames(model, 3), np.array([0.25, -0.75])
    controller = Controller(model, GOAL, planner=SMALL, execute=1)
    first = controller(obs[0])
    controller(obs[1])
    controller(obs[2], executed=really)
    np.testing.assert_allclose(model.denormalise(model.asked[-1][2][0, 0]), [*first, *really])


def test_reset_forgets_everything():
    model = PointModel(history=3)
    obs = frames(model, 9)
    controller = Controller(model, GOAL, planner=SMALL, execute=1)
    new = run(controller, obs)
    run(controller, obs[:3])
    controller.reset()
    assert controller.plan is None
    np.testing.assert_array_equal(run(controller, obs), new)
    controller.reset(-GOAL)
    np.testing.assert_array_equal(run(controller, obs), run(Controller(model, -GOAL, planner=SMALL, execute=1), obs))


def test_a_goal_picture_is_encoded_once():
    model = PointModel()
    controller = Controller(model, model.picture(GOAL), planner=SMALL, execute=1)
    run(controller, frames(model, 6))
    assert [name for name, _ in model.encoded] == ["goal", "obs", "obs", "obs"]


def test_environments_in_lockstep_do_as_each_alone():
    model = PointModel(history=3)
    obs = frames(model, 30).reshape(10, 3, 8, 8, 3)
    goals = model.encode(frames(model, 3, seed=1))
    batch = run(Controller(model, goals, planner=SMALL, execute=2, env_id=4), obs)
    assert batch.shape == (10, 3, 2)
    for e in range(3):
        alone = run(Controller(model, goals[e], planner=SMALL, execute=2, env_id=4 + e), obs[:, e])
        np.testing.assert_allclose(batch[:, e], alone, rtol=0, atol=1e-9)


def test_keep_goes_on_with_some_environments():
    model = PointModel(history=3)
    obs = frames(model, 30).reshape(10, 3, 8, 8, 3)
    goals = model.encode(frames(model, 3, seed=1))
    want = run(Controller(model, goals, planner=SMALL, execute=1, env_id=[7, 1, 4]), obs)
    controller = Controller(model, goals, planner=SMALL, execute=1, env_id=[7, 1, 4])
    np.testing.assert_array_equal(run(controller, obs[:3]), want[:3])
    controller.keep([True, False, True])
    np.testing.assert_allclose(run(controller, obs[3:, [0, 2]]), want[3:, [0, 2]], rtol=0, atol=1e-9)


def test_a_call_that_fails_leaves_it_as_it_was():
    model = PointModel(history=3)
    obs = frames(model, 8)
    want = run(Controller(model, GOAL, planner=SMALL, execute=1), obs)
    controller = Controller(model, GOAL, planner=SMALL, execute=1)
    costs = model.costs

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    for frame, action in zip(obs, want, strict=True):
        model.costs = interrupted
        with pytest.raises((KeyboardInterrupt, ValueError)):
            controller(frame if controller.plan is None or controller._step == 2 else frame.astype(float))
        model.costs = costs
        np.testing.assert_array_equal(controller(frame), action)


def test_a_deadline_holds_for_each_plan():
    model = PointModel()
    controller = Controller(model, GOAL, planner=CEM(iterations=2000), deadline_ms=30)
    controller(frames(model, 1)[0])
    assert controller.plan.deadline_hit
    assert controller.plan.latency_ms < 1000


def test_a_second_thread_is_refused():
    entered, leave = threading.Event(), threading.Event()

    class Waiting(PointModel):
        def costs(self, *args, **kwargs):
            entered.set()
            leave.wait(10)
            return super().costs(*args, **kwargs)

    model = Waiting()
    controller, obs = Controller(model, GOAL, planner=SMALL), model.picture([0, 0])
    results = []
    thread = threading.Thread(target=lambda: results.append(controller(obs)))
    thread.start()
    assert entered.wait(10)
    try:
        with pytest.raises(RuntimeError, match=r"in use by another thread"):
            controller(obs)
    finally:
        leave.set()
        thread.join()
    np.testing.assert_array_equal(results[0], controller.plan.action)
    controller(obs)  # free again


def test_a_tensor_in_gives_a_tensor_out():
    torch = pytest.importorskip("torch")
    model = PointModel()
    controller = Controller(model, GOAL, planner=SMALL)
    action = controller(torch.from_numpy(model.picture([0, 0])))
    assert isinstance(action, torch.Tensor)
    assert action.shape == (2,)
    assert controller(torch.from_numpy(model.picture([0, 0])), executed=action).shape == (2,)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"execute": 0}, ValueError, r"execute must be an integer of at least 1 and below 4, got 0"),
        ({"execute": 4}, ValueError, r"execute must be .*got 4"),
        ({"execute": 1.0}, TypeError, r"execute must be an integer"),
        ({"planner": "cem"}, TypeError, r"planner must be a lewm\.CEM, lewm\.ICEM or lewm\.MPPI, got str"),
        ({"goal": np.zeros(5)}, ValueError, r"goal latents must be of shape"),
    ],
)
def test_it_refuses_to_be_made(settings, error, match):
    with pytest.raises(error, match=match):
        Controller(PointModel(), settings.pop("goal", GOAL), **{"planner": SMALL, **settings})


def test_it_refuses_calls_that_do_not_fit():
    model = PointModel()
    obs = frames(model, 2)
    controller = Controller(model, GOAL, planner=SMALL)
    with pytest.raises(ValueError, match=r"executed must be None in the first call"):
        controller(obs[0], executed=[0, 0])
    controller(obs[0])
    with pytest.raises(ValueError, match=r"obs must be uint8 in \[0, 255\], got float64"):
        controller(obs[0] / 255)
    with pytest.raises(ValueError, match=r"executed must be a raw action of shape \(1, 2\), got \(3,\)"):
        controller(obs[0], executed=[0, 0, 0])
    with pytest.raises(ValueError, match=r"executed must be finite"):
        controller(obs[0], executed=[0, np.nan])
    with pytest.raises(ValueError, match=r"obs must be of 1 environments as in the last call, got 2"):
        controller(obs)
    with pytest.raises(ValueError, match=r"goal must be of 1 or 2 environments, as obs is, got 3"):
        Controller(model, np.zeros((3, 2)), planner=SMALL)(obs)
    with pytest.raises(ValueError, match=r"env_ids must be 2 integers"):
        Controller(model, GOAL, planner=SMALL, env_id=[1, 2, 3])(obs)
    with pytest.raises(ValueError, match=r"env_ids must be 2 integers"):
        Controller(model, GOAL, planner=SMALL, env_id="a")(obs)
    with pytest.raises(ValueError, match=r"mask must have one entry per environment"):
        controller.keep([True, False])
    with pytest.raises(ValueError, match=r"deadline_ms must be a positive number"):
        Controller(model, GOAL, planner=SMALL, deadline_ms=-1)(obs[0])
