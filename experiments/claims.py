"""Tries what papers claim, as far as seconds on a CPU can: `python -m experiments.claims`.

Writes docs/claims.md: a row for each claim with our small experiment, its number, and whether it
holds. Claims on the quality of large trained models are not among them.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float

import attention
from attention import catalogue
from experiments.benchmark.measure import directed, fastest
from experiments.errors import ExperimentError, run_command


@dataclass(frozen=True)
class ClaimsConfig:
    """Runs the small experiments and writes their table."""

    only: str = ""
    """Leave out mechanisms without this text in their name; then nothing is written."""
    output: Path = Path("docs/claims.md")
    """Markdown file to write."""


@dataclass(frozen=True)
class Claim:
    """What a paper says of a mechanism, and what we do about it."""

    mechanism: str
    says: str
    experiment: str
    measure: Callable[[], tuple[str, bool]]
    """Returns what was found, and whether the claim holds."""


def main() -> None:
    """The command line."""
    config = tyro.cli(ClaimsConfig, prog="python -m experiments.claims", description=__doc__)
    chosen = [claim for claim in CLAIMS if config.only in claim.mechanism]
    if not chosen:
        raise ExperimentError(f"only: {config.only!r} is in no mechanism's name")
    table = "\n".join(rows(chosen))
    print(table)
    if config.only:
        return
    try:
        config.output.write_text(f"{HEAD}\n{table}\n")
    except OSError as error:
        raise ExperimentError(f"output: cannot write {config.output}: {error}") from error


HEAD = """# Claims

What papers claim and a CPU can try, written by `python -m experiments.claims` in a few minutes.
Inputs are random with a fixed seed unless the experiment says otherwise; a claim that does not hold
here stays in the table. Speeds are claimed for GPUs, and measured on the device at hand: here two
CPU cores (AMD EPYC). What needs training is in the reports of `python -m experiments.compare` and
`python -m experiments.training_free`.
"""


def rows(claims: list[Claim]) -> list[str]:
    """The lines of the table, measured now."""
    lines = ["| mechanism | claim | experiment | found | holds |", "|---|---|---|---|---|"]
    for claim in claims:
        logging.getLogger("experiments").info("%s: %s", claim.mechanism, claim.says)
        found, holds = claim.measure()
        cells = f"`{claim.mechanism}`", claim.says, claim.experiment, found
        lines.append(f"| {' | '.join(cells)} | {'yes' if holds else 'no'} |")
    return lines


def _inputs(tokens: int, heads: int = 2, features: int = 32, seed: int = 0) -> list[Array]:
    return list(jax.random.normal(jax.random.key(seed), (3, 1, tokens, heads, features)))


def _weights(
    function: Callable[..., Array], query: Array, key: Array
) -> Float[np.ndarray, "T N S"]:
    """The weights that a mechanism gives to keys: outputs where values are unit vectors."""
    _, tokens, heads, _ = key.shape
    units = jnp.broadcast_to(jnp.eye(tokens)[None, :, None], (1, tokens, heads, tokens))
    return np.asarray(jax.jit(function)(query, key, units)[0])


def _bytes(slug: str, tokens: int, **options: object) -> int:
    """Bytes of a state of one sequence, of 4 heads of 64 channels in bfloat16."""
    record = catalogue.get(slug)
    sizes = (256, 64) if record.arguments else (4, 4, 64, 64)
    state = jax.eval_shape(lambda: record.init_state(1, tokens, *sizes, jnp.bfloat16, **options))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)


def _constant_state(slug: str) -> tuple[str, bool]:
    short, long = _bytes(slug, 2**10), _bytes(slug, 2**20)
    return f"{short:,} and {long:,} bytes", short == long


def _rat() -> tuple[str, bool]:
    ratio = _bytes("softmax_attention", 2**16) / _bytes("rat_attention", 2**16)
    return f"{ratio:.2f} times smaller", abs(ratio - 16) < 0.5


def _based_error() -> tuple[str, bool]:
    query, key, value = _inputs(64, features=16)
    errors = []
    for factor in (0.5, 0.25):
        # Scores scale with the product of both.
        q, k = (x * factor**0.5 for x in (query, key))
        ours = attention.based_linear_attention(q, k, value)
        exact = attention.softmax_attention(q, k, value, is_causal=True)
        errors.append(float(jnp.linalg.norm(ours - exact)))
    return f"{errors[0] / errors[1]:.2f} times less", errors[0] / errors[1] > 7


def _diff_qkv_cache() -> tuple[str, bool]:
    sigma = attention.init_diff_qkv_attention_state(1, 1024, 32, 4, 64, 64, num_value_heads=16)
    grouped = attention.init_softmax_attention_state(1, 1024, 32, 16, 64, 64)
    sizes = [sum(x.size for x in (s.key, s.value)) / 1024 for s in (sigma, grouped)]
    saved = 1 - sizes[0] / sizes[1]
    return f"{sizes[0]:.0f} and {sizes[1]:.0f} numbers a token: {saved:.1%} less", saved >= 0.375


def _agent_rank() -> tuple[str, bool]:
    query, key, _ = _inputs(14 * 14)
    function = functools.partial(attention.agent_attention, shape=(14, 14))
    weights = _weights(function, query, key)[:, 0]
    rank = np.linalg.matrix_rank(weights, tol=1e-5)
    rows_sum = np.abs(weights.sum(-1) - 1).max()
    return f"rank {rank}, rows sum to 1 within {rows_sum:.0e}", rank <= 49 and rows_sum < 1e-4


def _flex_mass(structured: bool) -> tuple[str, bool]:
    query, key, _ = _inputs(1024)
    if structured:
        # A few keys that all queries look at, and neighbours that are alike.
        key = key.at[:, ::128].add(3 * query.mean(axis=1, keepdims=True) + 0.5)
        walk = jnp.cumsum(query, axis=1) / jnp.arange(1, 1025)[None, :, None, None] ** 0.5
        query, key = query + walk, key + walk
    options = {"gamma": 0.9, "block_size": 32, "min_budget": 64}
    kept = _weights(functools.partial(attention.flex_prefill_attention, **options), query, key) != 0
    exact = _weights(functools.partial(attention.softmax_attention, is_causal=True), query, key)
    mass, density = (exact * kept).sum(-1).mean(), kept.mean() * 2
    return f"{mass:.3f} of the mass, by {density:.0%} of the keys", mass >= 0.9


def _combiner_sees_all() -> tuple[str, bool]:
    query, key, _ = _inputs(256)
    function = functools.partial(attention.combiner_attention, is_causal=True)
    weights = _weights(function, query, key)[:, 0]
    seen = (weights > 0)[np.tril_indices(256)].mean()
    return f"{seen:.1%} of the tokens before", seen == 1


def _landmark_all_blocks() -> tuple[str, bool]:
    query, key, value = _inputs(512)
    function = functools.partial(attention.landmark_attention, block_size=16)
    whole = function(query, key, value)
    error = float(jnp.abs(function(query, key, value, top_k=32) - whole).max())
    return f"largest difference {error:.0e}", error < 1e-5


def _neighborhood_shift() -> tuple[str, bool]:
    arrays = _inputs(32 * 32)
    options = {"shape": (32, 32), "window": 7}
    function = jax.jit(functools.partial(attention.neighborhood_attention, **options))

    def image(x: Array) -> Array:
        return x.reshape(1, 32, 32, *x.shape[2:])

    moved = [jnp.roll(image(x), 1, axis=2).reshape(x.shape) for x in arrays]
    here, there = image(function(*arrays)), image(function(*moved))
    inner = slice(4, 28)
    error = float(jnp.abs(there[:, inner, 5:28] - here[:, inner, 4:27]).max())
    return f"largest difference {error:.0e}", error < 1e-5


def _auto_correlation_period() -> tuple[str, bool]:
    time = jnp.arange(192.0)
    noise = jax.random.normal(jax.random.key(0), (1, 192, 1, 4))
    series = jnp.sin(2 * jnp.pi * time / 24)[None, :, None, None] + 0.3 * noise
    # At time 0 a lag's weight goes to the value of just that time.
    lags = np.flatnonzero(_weights(attention.auto_correlation, series, series)[0, 0])
    return f"lags {', '.join(map(str, lags))}", all(lag % 24 == 0 for lag in lags)


def _soft_inverse(features: int) -> tuple[str, bool]:
    arrays = _inputs(256, features=features)
    function = functools.partial(attention.soft_attention, shape=(16, 16))
    newton, solved = (function(*arrays, inverse=name) for name in ("newton", "solve"))
    error = float(jnp.linalg.norm(newton - solved) / jnp.linalg.norm(solved))
    return f"relative error {error:.0e}", error < 1e-2


def _hip_error() -> tuple[str, bool]:
    query, key, value = _inputs(1024)
    exact = attention.softmax_attention(query, key, value, is_causal=True)
    errors = []
    for kept in (64, 128, 256, 512):
        out = attention.hip_attention(query, key, value, mask_k=kept, window=64, group=4)
        errors.append(float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)))
    falls = all(a > b for a, b in itertools.pairwise(errors))
    return "errors " + ", ".join(f"{x:.2f}" for x in errors), falls


def _bi_level_all_regions() -> tuple[str, bool]:
    query, key, value = _inputs(28 * 28)
    options = {"shape": (28, 28), "regions": 7, "top_k": 49}
    out = attention.bi_level_routing_attention(query, key, value, **options)
    error = float(jnp.abs(out - attention.softmax_attention(query, key, value)).max())
    return f"largest difference {error:.0e}", error < 1e-5


def _faster(slug: str, tokens: int, claimed: float, direction: str) -> tuple[str, bool]:
    """How many times as fast as softmax attention a causal pass over one head is."""
    arrays, times = _inputs(tokens, heads=1, features=64), []
    for name in (slug, "softmax_attention"):
        function = catalogue.get(name).function
        if "is_causal" in catalogue.get(name).options:
            function = functools.partial(function, is_causal=True)
        function = jax.jit(directed(direction, function, range(3)))
        times.append(fastest(function, arrays, 1))
    ratio = times[1] / times[0]
    return f"{ratio:.2f} times as fast", ratio >= claimed


def _faster_generation(
    slug: str,
    tokens: int,
    claimed: float,
    heads: tuple[int, int, int],
    exact_heads: int,
    *,
    batch: int = 1,
    features: int = 64,
    **options: int,
) -> tuple[str, bool]:
    """How many times as fast as by softmax attention the last 16 of so many tokens are generated.

    Args:
      slug: of the mechanism.
      tokens: with the prompt.
      claimed: ratio that is claimed.
      heads: of its queries, keys and values, of 64 channels.
      exact_heads: key and value heads of softmax attention, of as many query heads.
      batch: sequences.
      features: of its queries and keys.
      **options: for its `init_state`.
    """
    times = []
    for name, own, width, more in (
        (slug, heads, features, options),
        ("softmax_attention", (heads[0], exact_heads, exact_heads), 64, {}),
    ):
        record, steps = catalogue.get(name), 16
        arrays = [
            jax.random.normal(jax.random.key(i), (batch, tokens, count, size))
            for i, (count, size) in enumerate(zip(own, (width, width, 64), strict=True))
        ]
        state = record.init_state(batch, tokens, *own[:2], width, 64, **more)
        prompt, rest = zip(*((x[:, :-steps], x[:, -steps:]) for x in arrays), strict=True)
        _, state = jax.jit(record.step)(state, *prompt)

        @jax.jit
        def generated(state: object, tokens: list[Array], step: Callable = record.step) -> object:
            def one(state: object, token: list[Array]) -> tuple[object, Array]:
                out, state = step(state, *(x[:, None] for x in token))
                return state, out

            return jax.lax.scan(one, state, [jnp.moveaxis(x, 1, 0) for x in tokens])[1]

        times.append(fastest(generated, (state, list(rest)), 3))
    ratio = times[1] / times[0]
    return f"{ratio:.2f} times as fast", ratio >= claimed


_CONSTANT = "memory while generating does not grow with the length"
_SIZES = "bytes of the state at 1k and at 1M tokens"

SPEEDS: tuple[Claim, ...] = (
    Claim(
        "sigmoid_attention",
        "inference is 17 % faster than FlashAttention's softmax",
        "8k tokens, forward, beside our softmax attention",
        functools.partial(_faster, "sigmoid_attention", 2**13, 1.17, "forward"),
    ),
    Claim(
        "hyper_attention",
        "a causal layer of 131k tokens is 5 times as fast",
        "131k tokens, forward, beside softmax attention",
        functools.partial(_faster, "hyper_attention", 2**17, 5, "forward"),
    ),
    Claim(
        "rat_attention",
        "chunks of 16 train 7 times as fast at 100k tokens",
        "64k tokens, forward and backward, beside softmax attention",
        functools.partial(_faster, "rat_attention", 2**16, 7, "gradient"),
    ),
    Claim(
        "rat_attention",
        "chunks of 16 generate 9 times as fast at 4k tokens",
        "16 tokens after 4k, batch of 8, beside softmax attention",
        functools.partial(_faster_generation, "rat_attention", 2**12, 9, (8, 8, 8), 8, batch=8),
    ),
    Claim(
        "based_linear_attention",
        "it generates 24 times as fast at 1k tokens (at 1.3 billion parameters)",
        "16 tokens after 1k, 16 features, batch of 8, beside softmax attention",
        functools.partial(
            _faster_generation,
            "based_linear_attention",
            2**10,
            24,
            (8, 8, 8),
            8,
            batch=8,
            features=16,
        ),
    ),
    Claim(
        "diff_qkv_attention",
        "inference is up to 33 % faster than with 16 grouped heads",
        "16 tokens after 32k, 32 query, 4 key and 16 value heads",
        functools.partial(
            _faster_generation,
            "diff_qkv_attention",
            2**15,
            1.33,
            (32, 4, 16),
            16,
            num_value_heads=16,
        ),
    ),
)
"""Claims of speed, which take longest to try."""

CLAIMS: tuple[Claim, ...] = (
    *(
        Claim(slug, _CONSTANT, _SIZES, functools.partial(_constant_state, slug))
        for slug in (
            "aaren_attention",
            "based_linear_attention",
            "lightning_attention",
            "norm_attention",
            "selective_scan",
            "titans_neural_memory",
        )
    ),
    Claim(
        "rat_attention",
        "chunks of 16 make the cache 16 times smaller",
        "state at 64k tokens beside a key-value cache",
        _rat,
    ),
    Claim(
        "based_linear_attention",
        "the Taylor polynomial is softmax up to third order in the scores",
        "error where scores are halved",
        _based_error,
    ),
    Claim(
        "diff_qkv_attention",
        "Sigma's cache is 37.5 % smaller than that of 16 grouped heads",
        "sizes of both caches",
        _diff_qkv_cache,
    ),
    Claim(
        "agent_attention",
        "with 49 agents it is linear attention of rank 49 with normalised rows",
        "rank of the weights of 196 tokens",
        _agent_rank,
    ),
    Claim(
        "flex_prefill_attention",
        "gamma = 0.9 keeps 90 % of the attention",
        "random inputs, 1024 tokens",
        functools.partial(_flex_mass, False),
    ),
    Claim(
        "flex_prefill_attention",
        "gamma = 0.9 keeps 90 % of the attention",
        "inputs with columns and diagonals, 1024 tokens",
        functools.partial(_flex_mass, True),
    ),
    Claim(
        "combiner_attention",
        "every token sees all before it, itself or in a span",
        "share of weights above 0, 256 tokens",
        _combiner_sees_all,
    ),
    Claim(
        "landmark_attention",
        "retrieving all blocks is what was trained",
        "top_k of all blocks beside none, 512 tokens",
        _landmark_all_blocks,
    ),
    Claim(
        "neighborhood_attention",
        "it moves with the image, away from the edges",
        "an image of 32 x 32 moved by one place",
        _neighborhood_shift,
    ),
    Claim(
        "auto_correlation",
        "the best lags are multiples of the period",
        "a noisy sine of period 24 in 192 times",
        _auto_correlation_period,
    ),
    Claim(
        "soft_attention",
        "20 of Newton's steps invert the kernel of the landmarks",
        "beside solving, heads of 32 channels",
        functools.partial(_soft_inverse, 32),
    ),
    Claim(
        "soft_attention",
        "20 of Newton's steps invert the kernel of the landmarks",
        "beside solving, heads of 4 channels",
        functools.partial(_soft_inverse, 4),
    ),
    Claim(
        "hip_attention",
        "more kept keys, less error, with no training",
        "64, 128, 256 and 512 kept of 1024 random ones",
        _hip_error,
    ),
    Claim(
        "bi_level_routing_attention",
        "with all regions it is full attention",
        "28 x 28 tokens, 49 of 49 regions",
        _bi_level_all_regions,
    ),
    *SPEEDS,
)


if __name__ == "__main__":
    run_command(main)
