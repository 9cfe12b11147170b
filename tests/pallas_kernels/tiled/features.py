"""Calls of tiled attention that between them use everything its kernels can do.

Lengths are such that kernels have two tiles or more each way, and ragged ends, at `TILES`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from pallas_kernels import masks, tiled
from pallas_kernels.partition import axes
from pallas_kernels.tiled import gpu_proved, tiled_attention
from tests.sharding import mesh, place

TILES = (128, 128)
LEARNED = ("bias", "logit_bias", "alibi_slopes", "sink", "row_statistic", "relative_bias")
"""Arguments, beside query, key and value, by which kernels differentiate."""


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A call: its shapes, and all arguments but query, key and value."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch: int = 1
    queries: int = 150
    keys: int = 200
    heads: int = 2
    key_heads: int = 2
    value_heads: int | None = None
    features: int = 32
    width: int | None = None
    dtype: Any = jnp.float32

    @property
    def normalises(self) -> bool:
        if "row_statistic" in self.options:
            return "reweight" in self.options
        return self.options.get("normalise", self.options.get("weights") != "sigmoid")

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the types of the arguments by which the call is differentiated."""
        shapes = {
            "query": (self.queries, self.heads, self.features),
            "key": (self.keys, self.key_heads, self.features),
            "value": (self.keys, self.value_heads or self.key_heads, self.width or self.features),
        }
        arrays = {
            name: jax.ShapeDtypeStruct((self.batch, *shape), self.dtype)
            for name, shape in shapes.items()
        }
        return arrays | {name: jax.typeof(self.options[name]) for name in self.learned}

    @property
    def learned(self) -> list[str]:
        """Returns the names of those that are no numbers."""
        return [n for n in LEARNED if isinstance(self.options.get(n), jax.Array | np.ndarray)]

    @property
    def arrays(self) -> dict[str, jax.Array]:
        """Returns the arguments by which the call is differentiated."""
        return {
            name: jnp.asarray(self.options[name])
            if name in self.learned
            else normal(seed, *x.shape, dtype=x.dtype)
            for seed, (name, x) in enumerate(self.shapes.items())
        }

    @property
    def others(self) -> dict[str, Any]:
        """Returns the rest of the arguments."""
        return {name: x for name, x in self.options.items() if name not in self.learned}

    def cotangents(self) -> tuple[jax.Array, jax.Array]:
        """Returns cotangents of the output and of the log-sum-exp."""
        shape = self.batch, self.queries, self.heads
        return normal(3, *shape, self.width or self.features), normal(4, *shape)

    def __call__(self, arrays: Mapping[str, jax.Array], **options: Any) -> tuple[jax.Array, ...]:
        """Calls tiled attention, and returns its one or two results."""
        options = {"return_lse": self.normalises, "tile_sizes": TILES} | self.others | options
        results = tiled_attention(**arrays, **options)
        return results if self.normalises else (results,)

    @property
    def parts(self) -> frozenset[str]:
        """Returns the names of its parts, and of its gradients, as a GPU's choice knows them."""
        options = {"tile_sizes": TILES, "function": "a call"} | self.others
        _, options, inputs = tiled._prepared(**self.arrays, **options)
        fields = {
            "alibi_slopes": "slopes",
            "logit_bias": "bias",
            "row_statistic": "statistic",
            "relative_bias": "table",
        }
        gradients = [fields.get(name, name) for name in self.shapes]
        return gpu_proved.parts_of(options=options, inputs=inputs, gradients=gradients)

    def loss(self, arrays: Mapping[str, jax.Array], **options: Any) -> tuple[jax.Array, tuple]:
        """Returns a scalar that every result enters, and the results."""
        results = self(arrays, **options)
        finite = (jnp.where(jnp.isneginf(x), 0, x.astype(jnp.float32)) for x in results)
        pairs = zip(finite, self.cotangents(), strict=False)
        return sum(jnp.sum(result * cotangent) for result, cotangent in pairs), results


def run_function(call, implementation, **options):
    """Returns a jitted function to gradients by all arrays, and results."""

    @jax.jit
    def run(arrays, mask):
        def loss(arrays):
            return call.loss(arrays, mask=mask, implementation=implementation, **options)

        return jax.grad(loss, has_aux=True)(arrays)

    return run


def defined(call):
    """Returns the same in float32."""
    arrays = jax.tree.map(lambda x: x.astype(jnp.float32), call.arrays)
    return run_function(call, "reference")(arrays, call.options.get("mask"))


def block_list(
    block_q: int,
    block_k: int,
    *,
    lists: int = 1,
    longest: int = 3,
    idle: bool = False,
    **call: Any,
) -> Call:
    """Returns a call with random block lists for each of so many heads, the first one empty.

    All of the first head's are, if it is idle.
    """
    call = Call(**call)
    rng = np.random.default_rng(8)
    rows, columns = -(-call.queries // block_q), -(-call.keys // block_k)
    longest = min(longest, columns)
    shape = call.batch, lists, rows
    indices = [np.sort(rng.permutation(columns)[:longest]) for _ in range(np.prod(shape))]
    counts = rng.integers(0, longest + 1, shape)
    counts.flat[0], counts.flat[-1] = 0, longest
    if idle:
        counts[:, 0] = 0
    # Behind the end of a list stand numbers of blocks that do not exist.
    listed = np.arange(longest) < counts[..., None]
    indices = np.where(listed, np.reshape(indices, (*shape, longest)), 10**6)
    mask = masks.blocks(indices.astype(np.int32), counts, block_q, block_k)
    if "mask" in call.options:
        mask &= call.options["mask"]
    return dataclasses.replace(call, options={**call.options, "mask": mask})


def _ids(*shape: int) -> np.ndarray:
    """Returns the number of the segment, ascending, of every token."""
    return np.sort(np.random.default_rng(5).integers(0, 3, shape), axis=-1)


def _some(*shape: int) -> np.ndarray:
    return np.random.default_rng(6).random(shape) < 0.4


T, S = Call.queries, Call.keys
SLOPES = np.array([0.5, 0.1], np.float32)
SINK = np.array([-1.0, 3.0], np.float32)
OFFSET = np.array([3, 60])
SEGMENTS = masks.segments(_ids(1, T), _ids(1, S))
LENGTHS = masks.lengths(np.array([T, 90]), np.array([3, 190]))
GROUPED = {"heads": 4, "key_heads": 2}

# Every program takes seconds to compile, so a call has as many features as it can hold: a term of
# scores or a mask changes what any other one gives, and a wrong one shows in the results of all.
SCORES = {
    "scale of zero, sink of rows, dense of queries, of keys, dilated": Call(
        {
            "scale": 0.0,
            "sink": normal(6, 2, T, 2),
            "mask": masks.dense(_some(1, 2, T, 1))
            & masks.dense(_some(2, 1, 1, S))
            & masks.dilated(3, 1),
        },
        batch=2,
    ),
    "negative scale, causal, window, bfloat16": Call(
        {"scale": -0.3, "mask": masks.causal(50) & masks.window(90, 5, 20)},
        dtype=jnp.bfloat16,
        **GROUPED,
    ),
    "soft cap, bias of keys, lengths, fewer key heads": Call(
        {
            "logits_soft_cap": 1.5,
            "scale": 0.5,
            "bias": normal(5, 2, 1, 1, S),
            "mask": LENGTHS,
        },
        batch=2,
        heads=4,
        key_heads=2,
        value_heads=4,
        features=64,
        width=16,
    ),
    "alibi with offsets, causal, segments of one sequence, grouped": Call(
        {
            "alibi_slopes": np.float32([0.5, 0.2, 0.1, 0.0]),
            "query_offset": OFFSET,
            "mask": masks.causal(30) & masks.segments(_ids(1, T)),
        },
        batch=2,
        keys=T,
        **GROUPED,
    ),
    "bounded, sink, segments, dense of heads, fewer value heads": Call(
        {
            "logits_bound": 30.0,
            "sink": np.float32([-1, 3, 0, 1]),
            "scale": 0.2,
            "mask": SEGMENTS & masks.dense(_some(1, 4, T, S)),
        },
        heads=4,
        key_heads=4,
        value_heads=2,
        width=64,
    ),
    "one query, bounded by a soft cap, logit bias": Call(
        {"logits_soft_cap": 2.0, "logit_bias": 1.5}, queries=1, keys=300, batch=2, **GROUPED
    ),
    "few, sigmoid, traced logit bias, segments of key heads, float16": Call(
        {
            "weights": "sigmoid",
            "logit_bias": jnp.float32(-3),
            "mask": masks.segments(_ids(1, 2, 7), _ids(1, 2, 9) - 1),
        },
        batch=2,
        queries=7,
        keys=9,
        dtype=jnp.float16,
        **GROUPED,
    ),
    "softplus, bias of queries, sink, rule, dynamic window": Call(
        {
            "weights": "softplus",
            "bias": normal(5, 1, 2, T, 1),
            "sink": SINK,
            "mask": masks.rule(jnp.less, normal(7, 2, 2, T), normal(8, 1, S))
            & masks.window(np.array([2, 90]), None, OFFSET),
        },
        batch=2,
    ),
    "relu as it is, prefix": Call(
        {
            "weights": "relu",
            "normalise": False,
            "mask": masks.prefix(np.array([40, 170]), 20),
        },
        batch=2,
    ),
    "everything": Call(
        {
            "scale": 0.5,
            "logits_soft_cap": 3.0,
            "logit_bias": 0.5,
            "bias": normal(5, 2, 1, T, S),
            "alibi_slopes": SLOPES,
            "sink": SINK,
            "query_offset": OFFSET,
            "mask": masks.causal(OFFSET)
            & masks.window(120, 0, OFFSET)
            & SEGMENTS
            & LENGTHS
            & masks.dilated(2)
            & masks.dense(_some(2, 1, T, S)),
        },
        batch=2,
    ),
    "groups of 16, alibi, sink, bias, dense, causal": Call(
        {
            "group_size": 16,
            "bias": normal(5, 1, 2, T, 208),
            "alibi_slopes": SLOPES,
            "sink": SINK,
            "query_offset": 60,
            # Of some groups nothing is seen, of some only their landmarks, of some all but them.
            "mask": masks.causal(60) & masks.dense(_some(1, 1, T, 208)) & masks.window(90, 0, 60),
        },
        keys=208,
    ),
    "groups of 128, bounded, lengths, bfloat16": Call(
        {"group_size": 128, "logits_soft_cap": 3.0, "mask": masks.lengths(key=np.array([300]))},
        keys=384,
        dtype=jnp.bfloat16,
    ),
    # Of keys that fill their tiles none is masked.
    "reweighted softmax, 80 features, whole tiles": Call(
        {"row_statistic": 5 + normal(6, 1, T, 3), "reweight": (2.0, 0.0)},
        heads=3,
        key_heads=1,
        features=80,
        width=96,
        keys=256,
    ),
    "reweighted softplus, alibi, bfloat16": Call(
        {
            "weights": "softplus",
            "row_statistic": -0.3 + 0.1 * SINK,
            "reweight": (1.0, 0.5),
            "alibi_slopes": np.float32([0.1, 0.0]),
        },
        dtype=jnp.bfloat16,
    ),
}
# Short blocks are gathered, each by its own copies, which take long to simulate.
BLOCK_LISTS = {
    "blocks of 16, statistic of heads, soft cap": block_list(
        16,
        16,
        options={"row_statistic": SINK[:1], "logits_soft_cap": 2.0},
        queries=40,
        keys=60,
        heads=1,
        key_heads=1,
    ),
    # Tiles of 16 by 32: a third of them each way.
    "blocks of 32 by 64, groups of 8": block_list(
        32, 64, options={"group_size": 8, "logits_soft_cap": 3.0}, keys=192
    ),
    "blocks of 48 by 96, statistic of a sigmoid, bias of heads": block_list(
        48,
        96,
        options={
            "weights": "sigmoid",
            "row_statistic": normal(6, 1, 60, 2),
            "bias": normal(5, 1, 2, 1, 1),
        },
        queries=60,
        keys=250,
        longest=2,
    ),
    "blocks of 128, of key heads and batch, segments of heads": block_list(
        128,
        128,
        options={"mask": masks.segments(_ids(1, 4, T), _ids(1, 500))},
        keys=500,
        lists=2,
        batch=2,
        **GROUPED,
    ),
    "blocks of 128, of key heads, one idle, sigmoid, bfloat16": block_list(
        128,
        128,
        options={"weights": "sigmoid", "logit_bias": -3.0},
        keys=300,
        lists=2,
        idle=True,
        dtype=jnp.bfloat16,
        **GROUPED,
    ),
    "blocks of 256 by 128, reweighted relu, causal": block_list(
        256,
        128,
        options={
            "weights": "relu",
            "row_statistic": -1 + 0.1 * normal(7, 1, 300, 2).at[:, 100].set(-jnp.inf),
            "reweight": (3.0, 0.5),
            "mask": masks.causal(np.array([120])),
        },
        queries=300,
        keys=600,
    ),
    "blocks of 128 by 256, relu, sink, bias, dense": block_list(
        128,
        256,
        options={
            "weights": "relu",
            "sink": SINK,
            "bias": normal(5, 1, 2, T, 500),
            "mask": masks.dense(_some(1, 2, T, 500)),
        },
        keys=500,
    ),
    "two lists, normalised sigmoid, alibi, bias of keys, causal that hides": block_list(
        64,
        128,
        options={
            "weights": "sigmoid",
            "normalise": True,
            "alibi_slopes": SLOPES,
            "bias": normal(5, 1, 2, 1, 300),
            "query_offset": 40,
            "mask": block_list(128, 64, keys=300).options["mask"] & masks.causal(-20),
        },
        keys=300,
        lists=2,
    ),
}
FEATURES = SCORES | BLOCK_LISTS

TABLES = {
    "relative bias of heads, offsets": Call(
        {"relative_bias": normal(5, 2, 31), "query_offset": np.array([3, 60]), "scale": 0.3},
        batch=2,
        queries=40,
        keys=70,
        dtype=jnp.bfloat16,
    ),
    "relative bias, short, causal": Call(
        {"relative_bias": normal(5, 1, 7), "mask": masks.causal(40), "tile_sizes": None},
        queries=140,
        keys=150,
        heads=1,
        key_heads=1,
        features=40,
    ),
    "relative bias, lists": block_list(
        64,
        64,
        options={"relative_bias": normal(5, 1, 255)},
        queries=100,
        keys=200,
        heads=1,
        key_heads=1,
    ),
}
"""Calls with a table of relative positions, which for TPU have tests of their own."""


SHARDED = Call(
    {"mask": masks.causal(), "sink": np.float32([-1, 3, 0, 1])},
    batch=4,
    queries=20,
    keys=30,
    heads=4,
    features=16,
)


def run_sharded(call: Call, implementation: str) -> tuple:
    """Returns gradients and results over eight devices, each with its part of batch and heads."""
    devices = mesh(AxisType.Explicit)
    arrays = {
        name: place(devices, x, *(("data", None, "tensor") if x.ndim == 4 else ()))
        for name, x in call.arrays.items()
    }
    with jax.set_mesh(devices), axes(batch="data", heads="tensor"):
        results = run_function(call, implementation)(arrays, call.options["mask"])
        assert results[1][0].sharding.spec[:3] == ("data", None, "tensor")
        return jax.block_until_ready(results)


def poison(call: Call) -> tuple[dict[str, np.ndarray], dict[str, jax.Array]]:
    """Returns which rows a call's ranges hide, and its arrays with NaN there."""
    seen = np.asarray(call.options["mask"].to_dense(call.queries, call.keys))[:, 0]
    hidden = {"query": ~seen.any(2), "key": ~seen.any(1), "value": ~seen.any(1)}
    assert hidden["key"].any()
    return hidden, call.arrays | {
        name: jnp.where(rows[..., None, None], jnp.nan, call.arrays[name])
        for name, rows in hidden.items()
    }


def with_other_ends(mask: masks.Mask) -> list[masks.Mask]:
    """Returns the same block lists with several numbers behind their ends."""
    listed = jnp.arange(mask.indices.shape[-1]) < mask.counts[..., None]
    assert not listed.all()
    return [
        dataclasses.replace(mask, indices=jnp.where(listed, mask.indices, number))
        for number in (0, -1, -(2**31), 2**31 - 1)
    ]


def check_queries_without_keys(implementation: str, hide: str, sink: np.ndarray | None) -> None:
    """Checks the results and gradients of queries that a mask or a bias leaves no keys."""
    hidden = np.isin(np.arange(150), [*range(5, 9), *range(130, 150)])
    if hide == "mask":
        options = {"mask": masks.dense(~hidden[:, None])}
    else:
        options = {"bias": jnp.where(hidden, -jnp.inf, 0.0)[:, None]}
    call = Call(options | ({} if sink is None else {"sink": sink}))

    @jax.jit
    def run(arrays):
        (out, lse), vjp = jax.vjp(lambda x: call(x, implementation=implementation), arrays)
        # Whatever cotangents a result of nothing has are no matter.
        bad = jnp.isneginf(lse)
        d_out, d_lse = call.cotangents()
        cotangents = jnp.where(bad[..., None], jnp.nan, d_out), jnp.where(bad, jnp.nan, d_lse)
        return out, lse, vjp(cotangents)[0]

    out, lse, gradients = jax.block_until_ready(run(call.arrays))
    np.testing.assert_array_equal(out[:, hidden], 0)
    expected = np.full(2, -np.inf, np.float32) if sink is None else sink
    np.testing.assert_allclose(lse[0, hidden], np.tile(expected, (hidden.sum(), 1)), rtol=3e-7)
    np.testing.assert_array_equal(gradients["query"][:, hidden], 0)
    chex.assert_tree_all_finite((out, gradients))
    assert (gradients["query"][:, ~hidden] != 0).all()
