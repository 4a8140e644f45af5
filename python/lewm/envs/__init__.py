"""Environments. Importing this package is cheap; importing `lewm` registers them."""

TWO_ROOM = "lewm/TwoRoom-v0"


def register() -> None:
    """Registers `lewm/TwoRoom-v0` with gymnasium; calling it again does nothing.

    The limit of 100 steps is the paper's (section 5, data of TwoRoom).
    """
    from gymnasium.envs import registration

    if TWO_ROOM not in registration.registry:
        registration.register(
            TWO_ROOM,
            entry_point="lewm.envs.two_room:TwoRoomEnv",
            vector_entry_point="lewm.envs.two_room:TwoRoomVectorEnv",
            max_episode_steps=100,
        )
