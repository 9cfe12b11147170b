"""What the mechanisms with a linear memory share."""

from pallas_kernels.linear import LinearState


def check_state(state: LinearState) -> LinearState:
    """Returns the state of a step.

    Raises:
      TypeError: it is none.
    """
    if not isinstance(state, LinearState):
        raise TypeError(f"state: must be a LinearState; got {type(state).__name__}")
    return state
