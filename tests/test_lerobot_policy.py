"""The LeRobot policy: their contract, in words of our own; and their own loops, where lerobot is installed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import lewm
from fake_models import PointModel, RoomModel
from lewm.envs.two_room import frame
from lewm.lerobot import LeWMConfig, LeWMPolicy, processors
from test_cpu_backend import TINY, some_weights

LIVE = pytest.mark.skipif(importlib.util.find_spec("lerobot") is None, reason="needs lerobot")
SIZE = 32
STATS = {"mean": [0.1, -0.2], "std": [0.5, 0.7], "low": [-1.0, -0.5], "high": [1.0, 2.0]}


class Cameras(gymnasium.Wrapper):
    """TwoRoom as LeRobot wants environments: pictures by camera, `is_success` in the info."""

    def __init__(self, env):
        super().__init__(env)
        pixels = env.observation_space
        cameras = gymnasium.spaces.Dict({"top": pixels, "goal": pixels})
        self.observation_space = gymnasium.spaces.Dict({"pixels": cameras})

    def reset(self, **kwargs):
        picture, info = self.env.reset(**kwargs)
        return self._seen(picture, info), {**info, "is_success": False}

    def step(self, action):
        picture, reward, terminated, truncated, info = self.env.step(action)
        return self._seen(picture, info), reward, terminated, truncated, {**info, "is_success": info["success"]}

    def _seen(self, picture, info):
        return {"pixels": {"top": picture, "goal": frame(info["goal_state"], SIZE)}}


def environments(count):
    def make():
        settings = {"obs_type": "pixels", "size": SIZE, "goal_rule": "anywhere", "max_episode_steps": 60}
        return Cameras(gymnasium.make("lewm/TwoRoom-v0", **settings))

    return gymnasium.vector.SyncVectorEnv([make] * count, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)


def batched(observation):
    """What LeRobot makes of an observation: float32 pictures, channels first, in [0, 1]."""
    cameras = observation["pixels"].items()
    pictures = {f"observation.images.{name}": torch.from_numpy(array) for name, array in cameras}
    return {name: (p.permute(0, 3, 1, 2).contiguous().float() / 255) for name, p in pictures.items()} | {"task": [""]}


def rolled_out(env, policy, seeds):
    """Their evaluation, as far as a policy sees it: until all are done; what follows an episode's end is ignored."""
    assert isinstance(policy, torch.nn.Module)
    policy.eval()
    policy.reset()
    observation, _ = env.reset(seed=seeds)
    done, success = np.zeros(env.num_envs, bool), np.zeros(env.num_envs, bool)
    actions = []
    while not done.all():
        with torch.inference_mode():
            action = policy.select_action(batched(observation))
        array = action.to("cpu").numpy()
        assert array.ndim == 2
        observation, _, terminated, truncated, info = env.step(array)
        success |= ~done & np.asarray(info.get("final_info", {}).get("is_success", np.zeros(len(done), bool)))
        actions.append(np.where(done[:, None], 0, array))
        done |= terminated | truncated
    return np.stack(actions), success


# --------------------------------------------------------------------------------------------------------- the contract


def test_it_solves_two_room_in_their_loop():
    policy = LeWMPolicy(RoomModel(SIZE), planner=lewm.CEM(64, 8, 8, 5), execute=1)
    assert (policy.config.device, policy.config.use_amp) == ("cpu", False)
    env = environments(4)
    actions, success = rolled_out(env, policy, [0, 1, 2, 3])
    assert success.sum() >= 3  # the one that remains is behind the wall, which its squared distance does not know
    assert policy.plan.backend == "fake"
    again, _ = rolled_out(env, policy, [0, 1, 2, 3])  # the goals are read anew: the same episodes again
    np.testing.assert_array_equal(actions, again)
    alone, _ = rolled_out(environments(1), policy, [0])
    np.testing.assert_allclose(actions[: len(alone), :1], alone, atol=1e-6)


def test_pictures_become_the_levels_they_were():
    levels = np.arange(256, dtype=np.uint8)
    picture = np.stack([levels, levels[::-1], np.roll(levels, 7)], -1).reshape(16, 16, 3)
    seen = []

    class Model(PointModel):
        def encode(self, frames, *, name="frames"):
            seen.append(frames)
            return super().encode(frames, name=name)

    policy = LeWMPolicy(Model(size=16), picture, planner=lewm.CEM(8, 1, 2, 2))
    for kind in (torch.float32, torch.float16, torch.float64, torch.uint8):
        policy.reset()
        channels_first = torch.from_numpy(picture).permute(2, 0, 1)[None].contiguous()
        image = channels_first if kind == torch.uint8 else (channels_first.to(torch.float32) / 255).to(kind)
        action = policy.select_action({"observation.image": image})
        assert (action.shape, action.dtype, action.device) == ((1, 2), torch.float32, image.device)
        np.testing.assert_array_equal(seen[-1], picture[None])


def test_goals_are_set_or_come_with_the_batch():
    model = PointModel(planner={"samples": 64, "iterations": 10, "elites": 8, "horizon": 1})

    def image(*points):
        pictures = np.stack([model.picture(point) for point in points])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255

    policy = LeWMPolicy(model)
    now = image([0, 0], [0, 0])
    with pytest.raises(ValueError, match="no goal: call set_goal, or have the batch hold pictures as observation.imag"):
        policy.select_action({"observation.images.top": now})
    batch = {"observation.images.top": now, "observation.images.goal": image([1, 1], [-1, -1])}
    assert (policy.select_action(batch).sign() == torch.tensor([[1, 1], [-1, -1]])).all()
    batch["observation.images.goal"] = image([-1, 1], [1, -1])
    policy.select_action(batch)  # the second of the block, and
    assert (policy.select_action(batch).sign() == torch.tensor([[1, 1], [-1, -1]])).all()  # of the goal at the reset
    policy.reset()
    assert (policy.select_action(batch).sign() == torch.tensor([[-1, 1], [1, -1]])).all()
    policy.set_goal(model.picture([1, -1]))  # one for all rows, before the batch's, kept by a reset
    for _ in range(2):
        assert (policy.select_action(batch).sign() == torch.tensor([[1, -1], [1, -1]])).all()
        policy.reset()
    policy.set_goal(np.array([[-1.0, -1.0], [1.0, 1.0]]))  # latents
    assert (policy.select_action(batch).sign() == torch.tensor([[-1, -1], [1, 1]])).all()
    policy.set_goal(None)
    assert (policy.select_action(batch).sign() == torch.tensor([[-1, 1], [1, -1]])).all()


def test_a_chunk_is_a_whole_plan_and_changes_nothing():
    model = PointModel(planner={"samples": 64, "iterations": 10, "elites": 8, "horizon": 3})
    batch = {"observation.images.top": torch.full((2, 3, 8, 8), 100 / 255)}
    policies = [LeWMPolicy(model, np.array([1.0, -1.0]), seed=3) for _ in range(2)]
    first = policies[0].predict_action_chunk(batch)
    assert (first.shape, first.dtype) == ((2, 6, 2), torch.float32)
    assert not torch.equal(first, policies[0].predict_action_chunk(batch))  # of new noise
    for _ in range(7):
        assert torch.equal(*(policy.select_action(batch) for policy in policies))
        policies[0].predict_action_chunk(batch)
    policies[0].reset()
    assert torch.equal(first, policies[0].predict_action_chunk(batch))


def test_settings_are_those_of_the_controller():
    model = PointModel(planner={"samples": 32, "iterations": 50, "elites": 8, "horizon": 3})
    policy = LeWMPolicy(model, np.ones(2), deadline_ms=1e-3, seed=1, env_id=np.array([7, 5]))
    batch = {"observation.images.top": torch.zeros(2, 3, 8, 8)}
    policy.select_action(batch)
    assert policy.plan.deadline_hit
    assert policy.predict_action_chunk(batch).shape == (2, 6, 2)
    with pytest.raises(TypeError, match="horizont"):
        LeWMPolicy(model, horizont=3)
    with pytest.raises(ValueError, match="execute must be an integer of at least 1 and below 4, got 9"):
        LeWMPolicy(model, execute=9)
    model.stats = None
    with pytest.raises(ValueError, match="no action statistics"):
        LeWMPolicy(model)


def test_batches_that_do_not_fit_are_named():
    policy = LeWMPolicy(PointModel(), np.ones(2), planner=lewm.CEM(8, 1, 2, 2))
    picture = torch.zeros(2, 3, 8, 8)
    top, side = "observation.images.top", "observation.images.side"
    for batch, text in (
        ({}, "camera must name the pictures .* no key that begins with observation.image"),
        ({top: picture, side: picture}, f"camera must name .* several cameras: {top}, {side}"),
        ({top: picture * 0 - 2}, rf"{top} must be in \[0, 1\], got values from -2 to -2: .* do not normalise"),
        ({top: picture + 255}, r"must be in \[0, 1\], got values from 255 to 255"),
        ({top: picture * torch.nan}, r"must be in \[0, 1\], got values from nan to nan"),
        ({top: picture.long()}, "must be of floating point or uint8, got torch.int64"),
        ({top: picture[0]}, r"must be a tensor \(B, 3, H, W\), got Tensor of shape \(3, 8, 8\)"),
        ({top: torch.zeros(2, 8, 8, 3)}, r"must be a tensor \(B, 3, H, W\)"),
        ({top: picture.numpy()}, r"must be a tensor \(B, 3, H, W\), got ndarray"),
    ):
        with pytest.raises(ValueError, match=text):
            policy.select_action(batch)
    policy.select_action({top: picture})
    with pytest.raises(ValueError, match="obs must be of 2 environments as in the last call, got 3"):
        policy.select_action({top: torch.zeros(3, 3, 8, 8)})
    policy.reset()
    assert policy.select_action({top: torch.zeros(3, 3, 8, 8)}).shape == (3, 2)
    named = LeWMPolicy(PointModel(), np.ones(2), camera=side, planner=lewm.CEM(8, 1, 2, 2))
    assert named.select_action({top: picture - 1, side: picture}).shape == (2, 2)
    with pytest.raises(ValueError, match=f"the batch holds no {side}, which camera names; it holds {top}"):
        named.select_action({top: picture})
    for untrained in (policy.get_optim_params, lambda: policy({})):
        with pytest.raises(NotImplementedError, match=r"trained by lewm.train, not by LeRobot"):
            untrained()


def test_a_policy_is_made_of_a_model_file(tmp_path):
    lewm.Model(TINY, some_weights(TINY), stats=STATS, backend="cpu").save(tmp_path / "model.safetensors")
    policy = LeWMPolicy.from_pretrained(tmp_path, goal=np.zeros((16, 16, 3), np.uint8), planner=lewm.CEM(8, 2, 2, 2))
    assert policy.to("cpu").eval() is policy
    action = policy.select_action({"observation.image": torch.rand(3, 3, 16, 16)})
    assert action.shape == (3, 2)
    assert (action >= torch.tensor(STATS["low"])).all()
    assert (action <= torch.tensor(STATS["high"])).all()
    policy.reset()
    with pytest.raises(ValueError, match="obs must be square .* got 16x12; crop it or pad it first"):
        policy.select_action({"observation.image": torch.rand(3, 3, 16, 12)})


def test_importing_lewm_imports_no_lerobot_and_a_broken_one_is_not_hidden(tmp_path):
    (tmp_path / "lerobot" / "configs").mkdir(parents=True)
    for file, text in (
        ("__init__.py", ""),
        ("configs/__init__.py", ""),
        ("configs/policies.py", "import no_such_library"),
    ):
        (tmp_path / "lerobot" / file).write_text(text)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import lewm; lewm.Controller; import lewm.lerobot"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "lewm/lerobot.py" in done.stderr
    assert done.stderr.strip().endswith("ModuleNotFoundError: No module named 'no_such_library'")


# -------------------------------------------------------------------------------------------------------- with lerobot


def identity():
    """Pipelines of LeRobot's that do nothing, for the environment's side."""
    from lerobot.processor import PolicyProcessorPipeline

    return PolicyProcessorPipeline(steps=[]), PolicyProcessorPipeline(steps=[])


@LIVE
def test_live_rollout_and_evaluation():
    from lerobot.policies.pretrained import PreTrainedPolicy
    from lerobot.scripts.lerobot_eval import eval_policy, rollout

    policy = LeWMPolicy(RoomModel(SIZE), planner=lewm.CEM(64, 8, 8, 5), execute=1)
    assert isinstance(policy, PreTrainedPolicy)
    env = environments(4)
    found = rollout(env, policy, *identity(), *processors(), seeds=[0, 1, 2, 3])
    ours, success = rolled_out(env, policy, [0, 1, 2, 3])
    length = len(ours)
    theirs, ended = found["action"].numpy(), found["done"].numpy()
    assert theirs.shape == (4, length, 2)
    np.testing.assert_array_equal(found["success"].any(1).numpy(), success)
    for i in range(4):
        until = ended[i].argmax() + 1
        np.testing.assert_array_equal(theirs[i, :until], ours[:until, i])
    results = eval_policy(env, policy, *identity(), *processors(), n_episodes=8, start_seed=0)
    _, more = rolled_out(env, policy, [4, 5, 6, 7])
    assert results["aggregated"]["pc_success"] == 100 * np.mean([success, more])


@LIVE
def test_live_control_of_a_robot(tmp_path):
    """`predict_action` is what their recording calls with a robot's observation and its camera's (H, W, 3) uint8."""
    try:
        from lerobot.utils.control_utils import predict_action
    except ModuleNotFoundError:
        from lerobot.common.control_utils import predict_action

    lewm.Model(TINY, some_weights(TINY), stats=STATS, backend="cpu").save(tmp_path / "model.safetensors")
    policy = LeWMPolicy.from_pretrained(tmp_path, goal=np.zeros((16, 16, 3), np.uint8), planner=lewm.CEM(8, 2, 2, 2))
    rng = np.random.default_rng(0)
    controller = lewm.Controller(policy.model, np.zeros((16, 16, 3), np.uint8), planner=lewm.CEM(8, 2, 2, 2))
    policy.reset()
    for _ in range(12):
        picture = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        observation = {"observation.images.front": picture.copy(), "observation.state": np.zeros(6, np.float32)}
        device = torch.device(policy.config.device)
        action = predict_action(observation, policy, device, *processors(), policy.config.use_amp, task="reach")
        np.testing.assert_array_equal(action.numpy().reshape(2), controller(picture).astype(np.float32))


@LIVE
def test_live_saving_and_loading(tmp_path):
    from lerobot.configs.policies import PreTrainedConfig

    policy = LeWMPolicy(lewm.Model(TINY, some_weights(TINY), stats=STATS, backend="cpu"))
    policy.save_pretrained(tmp_path / "policy")
    assert {path.name for path in (tmp_path / "policy").iterdir()} == {"config.json", "model.safetensors"}
    again = LeWMPolicy.from_pretrained(tmp_path / "policy")
    assert again.model.hash() == policy.model.hash()
    assert type(PreTrainedConfig.from_pretrained(tmp_path / "policy")) is LeWMConfig


@LIVE
def test_live_page(monkeypatch, tmp_path):
    """Every block of docs/lerobot.md, those too that tests/test_docs.py only compiles."""
    page = Path(__file__).parents[1] / "docs" / "lerobot.md"
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(lewm.PRESETS["tiny"].train, "steps", 12)
    scope = {"__name__": "__main__"}
    text = page.read_text(encoding="utf-8")
    assert text.count("episodes=300") == 1
    text = text.replace("episodes=300", "episodes=12")
    for match in re.finditer(r"^```python[^\n]*\n(.*?)^```$", text, re.M | re.S):
        exec(compile("\n" * text.count("\n", 0, match.start(1)) + match[1], str(page), "exec"), scope)
