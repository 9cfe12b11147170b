"""The parts of a call of linear attention: its dtype, decays, features, shapes of heads."""

import jax.numpy as jnp

from pallas_kernels.gpu_proved import Proved
from pallas_kernels.linear.inputs import Inputs, Options

DECAYS = {2: "decay of a head", 3: "decay of a token", 4: "decay of a token and feature"}


def parts_of(*, options: Options, inputs: Inputs) -> frozenset[str]:
    """Names the parts of a call; whoever has one has its gradient."""
    x, dtype = inputs, jnp.dtype(inputs.query.dtype).name
    decay = "no decay" if x.log_decay is None else DECAYS[x.log_decay.ndim]
    rule = "delta rule" if x.beta is not None else "sums"
    rule += " with momentum" if x.log_momentum is not None else ""
    sizes = {what: -(-a.shape[3] // 64) * 64 for what, a in (("keys", x.key), ("values", x.value))}
    terms = {
        f"features: {options.feature_map}": options.feature_map is not None,
        "not causal": not options.causal,
        "normalised": options.epsilon is not None,
        "segments": x.runs is not None,
        "initial state": x.memory is not None,
        "grouped queries": x.query.shape[2] != x.key.shape[2],
        "more values than queries": x.value.shape[2] > x.query.shape[2],
        "several spans": x.query.shape[1] > 4096,
    }
    named = {name for name, there in terms.items() if there}
    named |= {dtype, f"{dtype}, {rule}, {decay}"}
    return frozenset(named | {f"{dtype}, {size} of {what}" for what, size in sizes.items()})


PROVED = Proved(__package__, parts_of)
