"""Environments. Importing this package is cheap; importing `lewm` registers them."""

TWO_ROOM, PUSH_T = "lewm/TwoRoom-v0", "lewm/PushT-v0"

_MODULES = {TWO_ROOM: "two_room:TwoRoom", PUSH_T: "push_t:PushT"}


def register() -> None:
    """Registers `lewm/...` with gymnasium; calling it again does nothing.

    The limit of 100 steps is the paper's (section 5, data of TwoRoom). What an environment needs is imported when it is
    made.
    """
    from gymnasium.envs import registration

    for name, place in _MODULES.items():
        if name not in registration.registry:
            registration.register(
                name,
                entry_point=f"lewm.envs.{place}Env",
                vector_entry_point=f"lewm.envs.{place}VectorEnv",
                max_episode_steps=100,
            )
