"""Calls of linear attention, with what they should return by the oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear import LinearState, linear_attention
from tests.oracles.linear_attention import features
from tests.oracles.linear_attention import linear_attention as oracle

STATE = tuple(field.name for field in dataclasses.fields(LinearState))


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and features of a call.

    `decay` is None, log decays, one or one for each head, or of which arrays they are drawn, "step"
    (for each token) or "channel" (and feature). These hold all that is hard: 0, -inf, strong and
    weak ones; or nothing below the bound. `keys` is the number of keys where it is not that of
    tokens.
    """

    tokens: int = 24
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    value_heads: int | None = None
    features: int = 8
    width: int = 6
    chunk: int = 8
    decay: float | tuple[float, ...] | str | None = -0.3
    beta: bool = False
    momentum: bool = False
    feature_map: str | None = None
    normalize: bool = False
    causal: bool = True
    keys: int | None = None
    segments: bool = False
    state: bool = False
    scale: float = 1.0
    bound: float | None = None
    epsilon: float = 1e-6

    def arrays(self, dtype=np.float64, seed=0):
        """Returns the differentiable arguments by name, those of the state by their own."""
        rng = np.random.default_rng(seed)
        b, t, n, k, h, v = (
            self.batch,
            self.tokens,
            self.heads,
            self.kv_heads,
            self.features,
            self.width,
        )
        values = self.value_heads or k
        memories = max(n, values)
        arrays = {
            "query": rng.standard_normal((b, t, n, h)),
            "key": rng.standard_normal((b, self.keys or t, k, h)),
            "value": rng.standard_normal((b, self.keys or t, values, v)),
        }
        if self.beta:
            arrays["key"] /= np.linalg.norm(arrays["key"], axis=-1, keepdims=True)
        if self.normalize and self.feature_map is None:
            # Sums of weights of any sign come near 0, where errors have no bound.
            arrays |= {n: np.abs(arrays[n]) for n in ("query", "key")}
        arrays = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
        wide = jnp.promote_types(dtype, jnp.float32)

        def gates(*shape):
            strong = rng.choice([0, -np.inf, -1e30, -200.0, -8.0], (b, t, memories, *shape))
            weak = -np.exp(rng.standard_normal((b, t, memories, *shape)) - 1)
            if self.bound is not None:
                return np.maximum(4 * weak, self.bound)
            return np.where(rng.random((b, t, memories, *shape)) < 0.2, strong, weak)

        size = len(features(self.feature_map, np.zeros(h)))
        more = {}
        if self.decay in ("step", "channel"):
            more["log_decay"] = gates(*[h] * (self.decay == "channel"))
        elif self.decay is not None:
            more["log_decay"] = np.broadcast_to(self.decay, (memories,))
        if self.beta:
            more["beta"] = rng.uniform(0, 1.5, (b, t, memories))
        if self.momentum:
            more["log_momentum"] = gates()
        if self.state:
            more["memory"] = rng.standard_normal((b, memories, size, v))
        if self.state and self.normalize:
            more["key_sum"] = rng.uniform(0.5, 2, (b, memories, size))
        if self.state and self.momentum:
            more["momentum"] = rng.standard_normal((b, memories, size, v))
        return arrays | {name: jnp.asarray(x, wide) for name, x in more.items()}

    def segment_ids(self):
        """Returns ids of unequal runs, of which some recur, or None."""
        if not self.segments:
            return None
        rng = np.random.default_rng(1)
        lengths = rng.integers(1, 12, (self.batch, self.tokens))
        ids = [np.repeat(np.arange(self.tokens) % 2 + 5, row)[: self.tokens] for row in lengths]
        return np.stack(ids)

    def options(self):
        """Returns the arguments that are no arrays of floats."""
        return {
            "feature_map": self.feature_map,
            "normalize": self.normalize,
            "epsilon": self.epsilon,
            "causal": self.causal,
            "scale": self.scale,
            "segment_ids": self.segment_ids(),
        }

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def call(self, arrays, implementation):
        """Returns output and state by name."""
        return called(self, arrays, implementation)

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def differentiated(self, arrays, implementation):
        """Returns output and state, and gradients under random cotangents of all of them."""

        def loss(arrays):
            results = called(self, arrays, implementation)
            wide = {
                n: x.astype(jnp.promote_types(x.dtype, jnp.float32)) for n, x in results.items()
            }
            return total(wide), results

        gradients, results = jax.grad(loss, has_aux=True)(arrays)
        return results, gradients

    def gradients(self, arrays, implementation):
        """Returns the gradients alone."""
        return self.differentiated(arrays, implementation)[1]

    def defined(self, arrays):
        """Returns the same by the definition, in float64.

        In float32 it would, step by step, often be the less exact of two.
        """
        with jax.enable_x64(True):
            arrays = {n: jnp.asarray(np.float64(x)) for n, x in arrays.items()}
            return self.differentiated(arrays, "reference")

    def expected(self, arrays):
        """Returns output and state by the oracle."""
        arrays = {n: np.asarray(x, np.result_type(x.dtype, np.float64)) for n, x in arrays.items()}
        return oracle(**arrays, **self.options())

    def expected_slopes(self, arrays, directions):
        """Returns, by argument, the oracle's derivative of the same loss in one direction."""
        arrays = {n: np.float64(x) for n, x in arrays.items()}
        slopes = {}
        for name, direction in directions.items():
            moved = np.empty(arrays[name].shape, complex)
            moved.real, moved.imag = arrays[name], 1e-30 * direction
            slopes[name] = total(self.expected(arrays | {name: moved})).imag / 1e-30
        return slopes


def called(case, arrays, implementation, **options):
    """Calls with the arrays of a case."""
    arrays = dict(arrays)
    state = {name: arrays.pop(name) for name in STATE if name in arrays}
    out, state = linear_attention(
        **arrays,
        **case.options() | options,
        initial_state=LinearState(**state) if state else None,
        return_state=True,
        min_log_decay=case.bound,
        chunk_size=case.chunk,
        implementation=implementation,
    )
    return {"out": out} | {n: getattr(state, n) for n in STATE if getattr(state, n) is not None}


def total(results):
    """Returns a sum in which everything counts, the same of the code and of the oracle."""
    rng = np.random.default_rng(2)
    return sum((results[n] * rng.standard_normal(results[n].shape)).sum() for n in sorted(results))


def equal_keys(case):
    """Returns arrays with which the system that a chunk solves is as far from regular as can be."""
    arrays = case.arrays(jnp.bfloat16)
    key = np.zeros(case.features)
    key[[0, 2]] = 0.6, 0.8
    arrays["key"] = jnp.broadcast_to(jnp.bfloat16(key), arrays["key"].shape)
    arrays["beta"] = jnp.ones_like(arrays["beta"])
    return arrays


def of_rows(case, implementation):
    """Returns results and gradients under `jax.vmap` of two memories whose decays rows have."""
    arrays, decays = case.arrays(np.float32), jnp.float32([[-0.3, -0.1], [-1, 0]])

    def differentiated(log_decay):
        return case.differentiated(arrays | {"log_decay": log_decay}, implementation)

    return jax.block_until_ready(jax.jit(jax.vmap(differentiated))(decays))


VARIANTS = {
    "decay": dict(decay=-0.3),
    "steps": dict(decay="step"),
    "channels": dict(decay="channel"),
    "normalised": dict(decay="step", normalize=True, feature_map="elu_plus_one"),
    "taylor": dict(decay=None, normalize=True, feature_map="taylor"),
    "delta": dict(decay="step", beta=True),
    "delta, channels": dict(decay="channel", beta=True),
    "delta of features": dict(decay=None, beta=True, feature_map="taylor"),
    "momentum": dict(decay="step", beta=True, momentum=True),
}
"""What makes the variants: arguments of a case."""

CASES = {
    "plain": Case(kv_heads=1, decay=None, width=12),
    "decay": Case(37, chunk=16, decay=(-1.0, -0.1, -0.01, 0.0)),
    "one token": Case(1, state=True),
    "chunks of one": Case(5, chunk=1, state=True),
    "grouped": Case(kv_heads=2, decay=(-1.0, -0.5, -0.2, -0.1), state=True, scale=0.25),
    "groups of both": Case(heads=2, kv_heads=1, value_heads=4, segments=True, state=True),
    "decay of 0": Case(decay=(-np.inf, -np.inf, -1e4, 0.0), state=True),
    "segments, grouped": Case(21, kv_heads=2, segments=True, decay=(-np.inf, -1, -0.1, 0)),
    "steps": Case(32, chunk=16, decay="step", state=True),
    "steps, grouped": Case(kv_heads=2, decay="step", segments=True, state=True),
    "channels": Case(37, chunk=16, decay="channel", state=True),
    "channels, grouped": Case(kv_heads=2, decay="channel", segments=True, state=True),
    "delta": Case(beta=True, decay=None, state=True),
    "delta, decay": Case(beta=True, decay=(-1.0, 0.0), heads=2, kv_heads=1, segments=True),
    "delta, steps": Case(
        32, heads=2, kv_heads=1, value_heads=4, chunk=16, decay="step", beta=True, state=True
    ),
    "delta, channels": Case(
        21,
        heads=1,
        kv_heads=1,
        value_heads=3,
        decay="channel",
        beta=True,
        segments=True,
        state=True,
    ),
    "momentum": Case(16, beta=True, momentum=True, decay="step", segments=True, state=True),
    "momentum, no delta": Case(16, momentum=True, decay=-0.2, value_heads=8),
    "normalised": Case(normalize=True, decay=None, kv_heads=2, state=True),
    "normalised, channels": Case(normalize=True, decay="channel", segments=True, state=True),
    "elu": Case(feature_map="elu_plus_one", normalize=True, decay="step", segments=True),
    "taylor": Case(features=4, feature_map="taylor", normalize=True, decay=None, state=True),
    "all": Case(causal=False, feature_map="relu", decay=None, kv_heads=2, state=True),
    "all of other keys": Case(9, causal=False, decay=None, keys=20, value_heads=8),
    "all, segments": Case(16, causal=False, decay=None, kv_heads=2, segments=True, state=True),
    "all, normalised": Case(
        21,
        heads=2,
        kv_heads=1,
        value_heads=4,
        causal=False,
        decay=None,
        feature_map="taylor",
        features=3,
        normalize=True,
        segments=True,
        state=True,
    ),
}

ONE = dict(batch=1, heads=1, kv_heads=1, state=True)

# Every kernel takes seconds to compile, so a case has as much as it can hold.
TPU_CASES = {
    "decay, segments": Case(
        301,
        1,
        4,
        2,
        features=20,
        decay=(-np.inf, -8.0, -0.02, 0.0),
        segments=True,
        state=True,
        scale=0.25,
    ),
    "decay, bfloat16": Case(256, **ONE, width=130),
    "steps, groups of both, wide, relu": Case(
        20,
        1,
        2,
        1,
        value_heads=4,
        features=130,
        width=12,
        decay="step",
        normalize=True,
        feature_map="relu",
        state=True,
    ),
    "steps, shared keys, elu": Case(
        275, 1, 10, 1, decay="step", normalize=True, feature_map="elu_plus_one"
    ),
    "channels, no sum of weights to add to": Case(
        131, **ONE, decay="channel", normalize=True, segments=True, epsilon=0.0
    ),
    "delta, steps, bfloat16": Case(131, **ONE, decay="step", beta=True, segments=True),
    "delta, channels": Case(131, **ONE, decay="channel", beta=True, segments=True),
    "delta, channels, bound": Case(131, **ONE, decay="channel", beta=True, bound=-5.0),
    "delta of features": Case(301, **ONE, features=5, decay=None, beta=True, feature_map="taylor"),
    "momentum": Case(131, **ONE, decay="step", beta=True, momentum=True, segments=True),
    "taylor": Case(256, **ONE, features=5, decay=None, normalize=True, feature_map="taylor"),
    "all": Case(20, 1, 10, 1, decay=None, causal=False, keys=301, scale=0.25),
    "all, elu, bfloat16": Case(
        301,
        1,
        2,
        1,
        decay=None,
        causal=False,
        keys=20,
        normalize=True,
        feature_map="elu_plus_one",
        epsilon=0.0,
        state=True,
    ),
    "all, taylor": Case(
        256, **ONE, features=5, decay=None, causal=False, normalize=True, feature_map="taylor"
    ),
}
"""What the TPU kernels serve: tiles of 256 tokens, chunks of 128 and features in registers of 128,
full or not; more memories than a grid step has."""
