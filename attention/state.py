"""What the step forms of mechanisms ask of their states."""

from jax import Array


def check_state[State](state: State, kind: type[State]) -> State:
    """Returns the state of a step.

    Raises:
      TypeError: it is not of this kind.
    """
    if not isinstance(state, kind):
        raise TypeError(f"state: must be a {kind.__name__}; got {type(state).__name__}")
    return state


def check_room(owner: str, **pairs: tuple[Array, Array]) -> None:
    """Checks that new keys or values are of the batch, heads and width of those that are stored.

    Args:
      owner: what stores them, for messages.
      **pairs: by name, what is new and what is stored, [B, tokens, K, H].

    Raises:
      ValueError: they do not fit.
    """
    for name, (new, old) in pairs.items():
        if new.ndim != 4 or (new.shape[0], *new.shape[2:]) != (old.shape[0], *old.shape[2:]):
            wanted = (old.shape[0], "T", *old.shape[2:])
            raise ValueError(f"{name}: shape {new.shape} does not fit the {owner}'s, {wanted}")
