"""Puts other attention into a trained model: `python -m experiments.training_free RUN`.

The run's model is a language model with exact softmax attention. Its mechanism is changed and
nothing is trained again; printed is what that costs, against the share of keys that is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from rich.console import Console
from rich.table import Table

from attention import catalogue, softmax_attention
from experiments import config as configs
from experiments.config import MeshConfig, TextConfig
from experiments.data import text
from experiments.errors import USAGE, ExperimentError, run_command
from experiments.evaluate import load_model
from models.language import DecoderConfig, DecoderLM

EXACT = "softmax_attention"
Options = Mapping[str, Any]


def _sweep(tokens: int) -> dict[str, list[Options]]:
    """By mechanism, options that keep more and more of so many tokens."""
    parts = [max(tokens // n, 4) for n in (32, 16, 8, 4)]
    near = {"block_q": 16, "block_k": 2, "group": 2, "sinks": 4}
    return {
        "hip_attention": [{"mask_k": n, "window": max(n, 16), **near} for n in parts],
        "flex_prefill_attention": [
            {"gamma": gamma, "block_size": 16, "min_budget": 16} for gamma in (0.6, 0.8, 0.9, 0.98)
        ],
        "hyper_attention": [
            {"block_size": n, "num_samples": n, "min_seq_len": 2 * n} for n in parts
        ],
        "shifted_sparse_attention": [{"group_size": n, "num_sinks": 4} for n in parts],
    }


@dataclass(frozen=True)
class TrainingFreeConfig:
    """Loss and error of a trained model with other attention, against the share of keys kept."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of the run; its model has softmax attention."""
    mechanism: str | None = None
    """One mechanism of the catalogue; default: HiP, FlexPrefill, HyperAttention and shifted sparse
    attention, each with several options."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Options of `mechanism`."""
    tokens: int = 256
    """Length of the rows, each of one document of the test split."""
    rows: int = 8
    """Number of rows."""
    checkpoint: str = "last"
    """Which checkpoint: last, best (by validation loss), or a step."""
    seed: int = 0
    """Seed of the random inputs."""
    output: Path | None = None
    """JSON file to write."""


@dataclass(frozen=True)
class Kept:
    """What attention with fewer keys keeps and loses, beside the best choice of as many."""

    density: float
    """Keys with a weight, as a share of those that exact attention has."""
    error: float
    """RMS(output - exact output) / RMS(exact output)."""
    best: float
    """The same where every query keeps the keys of its largest weights, as many as there: the most
    weight that so many can have, and for a trained model about the least error."""


@dataclass(frozen=True)
class Row:
    """A mechanism and its options, measured."""

    mechanism: str
    options: Options
    bits_per_byte: float
    model: Kept
    """On the model's own queries, keys and values, all layers together."""
    random: Kept
    """On normal queries, keys and values of the same shape."""


def main() -> None:
    """The command line."""
    config = tyro.cli(
        TrainingFreeConfig, prog="python -m experiments.training_free", description=__doc__
    )
    rows = training_free(config)
    table = Table(title=f"{config.run}: {config.rows} rows of {config.tokens} bytes")
    columns = "mechanism, options, bits per byte, density, error, best error"
    columns += ", density (random), error (random), best error (random)"
    for name in columns.split(", "):
        table.add_column(name, justify="left" if name in ("mechanism", "options") else "right")
    for row in rows:
        options = " ".join(f"{name}={value}" for name, value in row.options.items())
        values = [x for kept in (row.model, row.random) for x in dataclasses.astuple(kept)]
        cells = (f"{x:.3f}" for x in values)
        table.add_row(row.mechanism, options, f"{row.bits_per_byte:.4f}", *cells)
    Console().print(table)
    if config.output is not None:
        try:
            found = [dataclasses.asdict(row) for row in rows]
            config.output.write_text(json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise ExperimentError(f"output: cannot write {config.output}: {error}") from error


def training_free(config: TrainingFreeConfig) -> list[Row]:
    """Measures exact attention and then every choice of mechanism and options.

    Raises:
      ExperimentError: the run cannot be read or is of another model, there are too few documents of
        that length, or an option does not fit.
    """
    run = configs.load(config.run)
    if not isinstance(run, TextConfig) or set(run.model.mixers) != {EXACT}:
        raise ExperimentError(
            f"run: {config.run} must be of the task text, with {EXACT} in every layer; it has "
            f"{', '.join(dict.fromkeys(run.model.mixers))}"
        )
    choices: list[tuple[str, Options]] = [(EXACT, {})]
    if config.mechanism is None:
        if config.options:
            raise ExperimentError("options: they are of `mechanism`, and none is given", USAGE)
        for name, sweep in _sweep(config.tokens).items():
            choices += [(name, options) for options in sweep]
    else:
        choices.append((config.mechanism, config.options))
    _, _, parameters, _ = load_model(config.run, run, config.checkpoint, MeshConfig())
    parameters = jax.device_put(parameters, jax.local_devices()[0])
    tokens = jnp.asarray(_rows(run, config.rows, config.tokens))
    own = heads(run.model, parameters, tokens[:, :-1])
    keys = jax.random.split(jax.random.key(config.seed), 3)
    random = [
        tuple(jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, qkv, strict=True))
        for qkv in own[:1]
    ]
    found = []
    for name, options in choices:
        try:
            bits = bits_per_byte(changed(run.model, name, options), parameters, tokens)
            measured = jax.jit(
                functools.partial(_sums, functools.partial(_causal(name), **options))
            )
            each = kept(measured, own), kept(measured, random)
            found.append(Row(name, dict(options), bits, *each))
        except (ValueError, TypeError) as error:
            raise ExperimentError(f"{name}: {error}", USAGE) from error
    return found


def changed(model: DecoderConfig, mechanism: str, options: Options) -> DecoderConfig:
    """A model's configuration with another mechanism, which takes the same parameters."""
    # One loop over the layers compiles as fast as a single layer.
    return dataclasses.replace(
        model, mechanism=mechanism, layers=(), options=dict(options), scan_layers=True
    )


def _causal(mechanism: str) -> Callable[..., Array]:
    record = catalogue.get(mechanism)
    if "self causal" not in record.patterns or record.arguments:
        raise ValueError(f"mechanism: {mechanism!r} has no causal form for queries and keys")
    causal = {"is_causal": True} if "is_causal" in record.options else {}
    return functools.partial(record.function, **causal)


def _rows(run: TextConfig, count: int, length: int) -> Int[np.ndarray, "rows T+1"]:
    """The first bytes of the first documents of the test split that are long enough."""

    def long_enough() -> Iterator[np.ndarray]:
        for document in text.documents(run.data, run.data.test_split):
            if len(document) >= length:
                yield np.array([text.BOS, *document[:length]], np.int32)

    try:
        rows = [row for row, _ in zip(long_enough(), range(count), strict=False)]
    except (ValueError, OSError) as error:
        raise ExperimentError(f"data: {error}") from error
    if len(rows) < count:
        raise ExperimentError(
            f"rows: {count}, but {run.data.name} {run.data.test_split} has {len(rows)} documents "
            f"of {length} bytes or more"
        )
    return np.stack(rows)


def bits_per_byte(model: DecoderConfig, parameters: Any, tokens: Int[Array, "B T+1"]) -> float:
    """The loss of a model on rows of one document each."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: DecoderLM(model, rngs=nnx.Rngs(0))))

    @jax.jit
    def loss(parameters: Any) -> Array:
        logits = nnx.merge(graph, parameters)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return float(loss(parameters)) / math.log(2)


def heads(
    config: DecoderConfig, parameters: Any, tokens: Int[Array, "B T"]
) -> list[tuple[Array, Array, Array]]:
    """Queries, keys and values of every layer, as its mechanism is given them."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: DecoderLM(config, rngs=nnx.Rngs(0))))

    @jax.jit
    def run(parameters: Any) -> list[tuple[Array, Array, Array]]:
        return nnx.merge(graph, parameters).heads(tokens)

    return run(parameters)


def kept(
    measured: Callable[..., tuple[Array, ...]], inputs: list[tuple[Array, Array, Array]]
) -> Kept:
    """What a mechanism keeps of exact attention and how far its output is off, over some inputs."""
    found = np.array([jax.device_get(measured(*qkv)) for qkv in inputs], np.float64)
    share, (error, best, exact) = found[:, 0].mean(), found[:, 1:].sum(0)
    return Kept(float(share), math.sqrt(error / exact), math.sqrt(best / exact))


def _sums(
    function: Callable[..., Array],
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
) -> tuple[Array, ...]:
    """The density, and squared sums of the error, of the best choice's, and of exact outputs.

    Weights are outputs where the value of key j is the j-th unit vector.
    """
    batch, tokens, kv_heads, _ = key.shape
    units = jnp.broadcast_to(jnp.eye(tokens)[None, :, None], (batch, tokens, kv_heads, tokens))
    weights = function(query, key, units.astype(value.dtype))
    exact = softmax_attention(query, key, units.astype(value.dtype), is_causal=True)
    values = jnp.repeat(value, query.shape[2] // kv_heads, axis=2)

    def outputs(weights: Array) -> Array:
        return jnp.einsum("btns,bsnv->btnv", weights, values)

    seen = weights != 0
    best = jnp.where(_largest(exact, seen.sum(-1)), exact, 0)
    best /= jnp.maximum(best.sum(-1, keepdims=True), jnp.finfo(best.dtype).tiny)
    true = outputs(exact)
    fraction = seen.sum() / (batch * query.shape[2] * tokens * (tokens + 1) / 2)
    squares = ((outputs(w) - true) ** 2 for w in (weights, best))
    return fraction, *(x.sum() for x in squares), (true**2).sum()


def _largest(
    weights: Float[Array, "B T N S"], count: Int[Array, "B T N"]
) -> Bool[Array, "B T N S"]:
    """Where the largest weights of each row are, so many of them."""
    order = jnp.argsort(-weights, axis=-1)
    rank = jnp.argsort(order, axis=-1)
    return rank < count[..., None]


if __name__ == "__main__":
    run_command(main)
