"""Calls of scans that between them use everything their implementations can do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import scan
from pallas_kernels.scan import ScanState, SoftmaxState
from tests.oracles.gated_scan import gated_scan
from tests.oracles.selective_scan import selective_scan
from tests.oracles.softmax_scan import softmax_scan

NAMED = {
    "gated": ("x", "log_decay"),
    "selective": ("x", "delta", "A", "B", "C", "D", "delta_bias"),
    "softmax": ("score", "value"),
}
PARAMETERS = ("A", "D", "delta_bias")


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: shapes and features. Channels are heads of scores; features, numbers in a state."""

    scan: str
    tokens: int = 12
    batch: int = 2
    channels: int = 6
    features: int = 4
    groups: int | None = None  # of input and output vectors, or heads of values
    chunk: int | None = 4
    segments: bool = False
    state: bool = False
    log_decay: float | None = None  # of all tokens of a gated scan; None for random ones
    skip: bool = True
    bias: bool = True
    softplus: bool = True

    @property
    def shapes(self):
        """Returns the shapes of all differentiable arguments by name."""
        b, t, d, n = self.batch, self.tokens, self.channels, self.features
        groups = () if self.groups is None else (self.groups,)
        if self.scan == "gated":
            shapes = {"x": (b, t, d), "log_decay": (b, t, d), "hidden": (b, d)}
        elif self.scan == "softmax":
            shapes = {"score": (b, t, d), "value": (b, t, *(groups or (d,)), n)}
            shapes |= {"maximum": (b, d), "total": (b, d), "weighted": (b, d, n)}
        else:
            vectors = (b, t, *groups, n)
            shapes = {"x": (b, t, d), "delta": (b, t, d), "A": (d, n), "B": vectors, "C": vectors}
            shapes |= {"D": (d,)} if self.skip else {}
            shapes |= {"delta_bias": (d,)} if self.bias else {}
            shapes |= {"hidden": (b, n, d)}
        names = NAMED[self.scan]
        return {n: shape for n, shape in shapes.items() if self.state or n in names}

    def arrays(self, dtype=np.float64, seed=0):
        """Returns all differentiable arguments by name."""
        rng = np.random.default_rng(seed)
        arrays = {name: rng.standard_normal(shape) for name, shape in self.shapes.items()}
        if "log_decay" in arrays:
            arrays["log_decay"] = -np.exp(arrays["log_decay"])
            if self.log_decay is not None:
                arrays["log_decay"][...] = self.log_decay
        if "A" in arrays:
            arrays["A"] = -np.exp(arrays["A"])
        if "delta" in arrays and not self.softplus:
            arrays["delta"] = 0.3 * np.abs(arrays["delta"])
        if "total" in arrays:
            arrays["total"] = np.exp(arrays["total"])
        wide = np.float64 if dtype == np.float64 else np.float32
        narrow = ("x", "delta", "B", "C", "score", "value", "log_decay")
        return {n: jnp.asarray(x, dtype if n in narrow else wide) for n, x in arrays.items()}

    def segment_ids(self):
        """Returns ids of unequal runs, of which some recur, or None."""
        if not self.segments:
            return None
        lengths = np.random.default_rng(1).integers(1, 6, (self.batch, self.tokens))
        ids = [np.repeat(np.arange(self.tokens) % 2 + 5, row)[: self.tokens] for row in lengths]
        return np.stack(ids)

    def part(self, arrays, tokens, state, segment_ids, implementation):
        """Returns output and state of a slice of the tokens, continuing a state."""
        named = {n: arrays[n] for n in NAMED[self.scan] if n in arrays}
        named |= {n: x[:, tokens] for n, x in named.items() if n not in PARAMETERS}
        options = {"softplus": self.softplus} if self.scan == "selective" else {}
        return getattr(scan, f"{self.scan}_scan")(
            **named,
            **options,
            segment_ids=None if segment_ids is None else segment_ids[:, tokens],
            initial_state=state,
            return_state=True,
            chunk_size=self.chunk,
            implementation=implementation,
        )

    def initial(self, arrays):
        """Returns the initial state of a call, or None."""
        if not self.state:
            return None
        kind = SoftmaxState if self.scan == "softmax" else ScanState
        return kind(**{f.name: arrays[f.name] for f in dataclasses.fields(kind)})

    def traced(self, arrays, implementation, segment_ids=None):
        """Returns the output and the parts of the last state that mean something."""
        ids = self.segment_ids() if segment_ids is None else segment_ids
        every, state = slice(None), self.initial(arrays)
        out, state = self.part(arrays, every, state, ids, implementation)
        return out, meaning(state)

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def call(self, arrays, implementation):
        """Is `traced`, compiled."""
        return self.traced(arrays, implementation)

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def gradients(self, arrays, implementation):
        """Returns the gradients of `loss` by all arguments, and the results."""

        def loss(arrays):
            results = self.traced(arrays, implementation)
            return self.loss(results), results

        return jax.grad(loss, has_aux=True)(arrays)

    def expected(self, arrays):
        """Returns the same by the oracle."""
        arrays = {n: np.float64(x) for n, x in arrays.items()}
        given, state = [arrays.get(n) for n in NAMED[self.scan]], self.initial(arrays)
        ids = self.segment_ids()
        if self.scan == "gated":
            return gated_scan(*given, ids, arrays.get("hidden"))
        if self.scan == "selective":
            return selective_scan(*given, self.softplus, ids, arrays.get("hidden"))
        if state is not None:
            lse = state.maximum + np.log(state.total)
            state = lse, state.weighted / state.total[..., None]
        return softmax_scan(*given, ids, state)

    def loss(self, results):
        """Returns a sum of all results with random weights; a log-sum-exp of -inf counts 0."""
        rng = np.random.default_rng(2)
        numpy = np if isinstance(jax.tree.leaves(results)[0], np.ndarray) else jnp
        loss = 0.0
        for result in jax.tree.leaves(results):
            wide = result.astype(np.promote_types(result.dtype, np.float32))
            finite = numpy.where(numpy.isneginf(wide), 0, wide)
            loss += numpy.sum(finite * rng.standard_normal(result.shape).astype(wide.dtype))
        return loss


def meaning(state):
    """Returns a state; that of a softmax scan as its log-sum-exp and its mean of values."""
    if isinstance(state, ScanState):
        return state.hidden
    seen = state.total > 0
    total = jnp.where(seen, state.total, 1)
    lse = jnp.where(seen, state.maximum + jnp.log(total), -jnp.inf)
    return lse, jnp.where(seen[..., None], state.weighted / total[..., None], 0)


CASES = {
    "gated": Case("gated"),
    "gated, all": Case("gated", tokens=15, segments=True, state=True),
    "gated, one token": Case("gated", tokens=1, state=True),
    "gated, one chunk": Case("gated", tokens=4, chunk=64),
    "gated, chunks of one": Case("gated", tokens=5, chunk=1, state=True),
    "gated, decay of 0": Case("gated", log_decay=-np.inf, state=True),
    "gated, decay of 1": Case("gated", log_decay=0.0, state=True, segments=True),
    "selective": Case("selective", skip=False, bias=False),
    "selective, all": Case("selective", tokens=15, segments=True, state=True),
    "selective, grouped": Case("selective", groups=2, segments=True, state=True),
    "selective, one group": Case("selective", groups=1, softplus=False, state=True),
    "selective, one token": Case("selective", tokens=1, state=True, features=1),
    "softmax": Case("softmax"),
    "softmax, all": Case("softmax", tokens=15, segments=True, state=True),
    "softmax, grouped": Case("softmax", groups=2, segments=True, state=True),
    "softmax, one token": Case("softmax", tokens=1, groups=1, chunk=1),
}

TPU_CASES = {
    "gated, float32": Case(
        "gated", tokens=136, channels=100, chunk=None, segments=True, state=True
    ),
    "gated, bfloat16": Case("gated", tokens=256, batch=1, channels=256, chunk=None),
    "selective, float32": Case(
        "selective", 136, 1, 100, features=5, chunk=None, segments=True, state=True
    ),
    "selective, bfloat16": Case(
        "selective", 128, 1, 256, 8, groups=2, chunk=None, skip=False, bias=False, softplus=False
    ),
    "softmax, float32": Case(
        "softmax", 136, 1, 6, 130, groups=2, chunk=None, segments=True, state=True
    ),
    "softmax, bfloat16": Case("softmax", 256, 1, 16, 64, groups=1, chunk=256),
}
"""What the TPU kernels serve: chunks of the default size, channels and numbers that fill registers
or do not."""
