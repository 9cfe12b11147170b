"""Which implementation of a kernel family serves a call."""

from collections.abc import Callable, Mapping

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_gpu")

Supports = Callable[..., str | None]
"""`supports(**call)` of an implementation: None if it serves the call, or the reason why not."""


def resolve_implementation(
    implementation: str | None, available: Mapping[str, Supports], *, function: str, **call: object
) -> str:
    """Returns the name of the implementation that is to serve a call.

    Args:
      implementation: the caller's wish; None for the best that supports the call.
      available: the family's implementations, best first, each with its `supports`.
      function: name of the public function, for messages.
      **call: what `supports` looks at.

    Raises:
      ValueError: there is no implementation of this name.
      NotImplementedError: the named implementation does not exist in this family, or does not
        support the call; the message says why.
    """
    if implementation is None:
        reasons = {}
        for name, supports in available.items():
            reason = supports(**call)
            if reason is None:
                return name
            reasons[name] = reason
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NotImplementedError(f"{function}: no implementation supports this call: {listed}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{function}: implementation must be None or one of {', '.join(IMPLEMENTATIONS)}; "
            f"got {implementation!r}"
        )
    if implementation not in available:
        reason = f"it has none; it has {', '.join(available)}"
    else:
        reason = available[implementation](**call)
    if reason is not None:
        raise NotImplementedError(
            f"{function}: implementation {implementation!r} does not serve this call: {reason}"
        )
    return implementation
