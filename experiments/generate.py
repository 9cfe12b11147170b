"""Continues a prompt with a trained model: `python -m experiments.generate RUN --prompt "def "`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments import config as configs
from experiments.config import MeshConfig, TextConfig
from experiments.data.text import BOS, VOCAB_SIZE
from experiments.errors import USAGE, ExperimentError, run_command
from experiments.evaluate import load_model
from models.language import DecoderConfig, DecoderLM, DecoderState

CHUNK = 64  # bytes between two looks of the host, so that text appears while it is made


@dataclass(frozen=True)
class GenerateConfig:
    """Samples text from a run's model."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of the run."""
    prompt: str = "def "
    """The text to continue."""
    length: int = 400
    """Bytes to generate at most; the model may end its document earlier."""
    temperature: float = 0.8
    """Logits are divided by it; 0: always the likeliest byte."""
    top_k: int | None = None
    """Sample among so many likeliest bytes only."""
    top_p: float | None = None
    """Sample among the fewest likeliest bytes whose probabilities sum to this."""
    seed: int = 0
    """Seed of the sampling."""
    checkpoint: str = "last"
    """Which checkpoint: last, best (by validation loss), or a step."""


def main() -> None:
    """The command line."""
    config = tyro.cli(GenerateConfig, prog="python -m experiments.generate", description=__doc__)
    sys.stdout.write(config.prompt)
    for piece in generate(config):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def generate(config: GenerateConfig) -> Iterator[str]:
    """Yields the continuation of the prompt, piece by piece.

    Raises:
      ExperimentError: for an option out of its range, or a run that cannot be read.
    """
    _check(config)
    run = configs.load(config.run)
    if not isinstance(run, TextConfig):
        raise ExperimentError(
            f"run: {config.run} is of the task {configs.task_of(run)!r}; only models of text "
            "generate it"
        )
    try:
        jax.eval_shape(lambda: DecoderLM(run.model, rngs=nnx.Rngs(0)).init_state(1, 1))
    except ValueError as error:
        raise ExperimentError(f"run: {config.run} cannot generate: {error}") from error
    # One sequence does not fill several devices: sampling uses the first alone.
    with jax.default_device(jax.local_devices()[0]):
        _, _, parameters, _ = load_model(config.run, run, config.checkpoint, MeshConfig())
        parameters = jax.device_put(parameters, jax.local_devices()[0])
        prompt = [BOS, *config.prompt.encode()]
        pieces = sample(
            run.model,
            parameters,
            jnp.asarray([prompt], jnp.int32),
            jax.random.key(config.seed),
            length=config.length,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
        pending = b""
        for piece in pieces:
            symbols = piece[0].tolist()
            ended = BOS in symbols
            pending += bytes(symbols[: symbols.index(BOS)] if ended else symbols)
            # A character may be cut in two by the end of a piece.
            text, pending = _whole_characters(pending)
            yield text
            if ended:
                break
        yield pending.decode(errors="replace")


def sample(
    config: DecoderConfig,
    parameters: Any,
    prompt: Int[Array, "B T"],
    key: PRNGKeyArray,
    *,
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Iterator[np.ndarray]:
    """Continues prompts by one symbol at a time, from the model's recurrent state or cache.

    Args:
      config: the model's configuration.
      parameters: its parameters.
      prompt: symbols to continue; all rows of one length.
      key: randomness.
      length: symbols to generate.
      temperature: see `next_symbol`.
      top_k: see `next_symbol`.
      top_p: see `next_symbol`.

    Yields:
      int32 [B, n]: the next symbols, CHUNK at a time.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: DecoderLM(config, rngs=nnx.Rngs(0))))
    choose = functools.partial(next_symbol, temperature=temperature, top_k=top_k, top_p=top_p)

    @jax.jit
    def start(parameters: Any, prompt: Array) -> tuple[Array, DecoderState]:
        model = nnx.merge(graph, parameters)
        rows, tokens = prompt.shape
        logits, state = model.step(prompt, model.init_state(rows, tokens + length))
        return logits[:, -1], state

    @functools.partial(jax.jit, static_argnames="count", donate_argnums=2)
    def go_on(
        parameters: Any, logits: Array, state: DecoderState, key: PRNGKeyArray, count: int
    ) -> tuple[Array, DecoderState, Array]:
        model = nnx.merge(graph, parameters)

        def one(carry: Any, key: PRNGKeyArray) -> tuple[Any, Array]:
            logits, state = carry
            symbol = choose(key, logits)
            logits, state = model.step(symbol[:, None], state)
            return (logits[:, -1], state), symbol

        (logits, state), symbols = jax.lax.scan(one, (logits, state), jax.random.split(key, count))
        return logits, state, symbols.T

    logits, state = start(parameters, prompt)
    for done in range(0, length, CHUNK):
        count = min(CHUNK, length - done)
        logits, state, symbols = go_on(
            parameters, logits, state, jax.random.fold_in(key, done), count
        )
        yield np.asarray(symbols)


def next_symbol(
    key: PRNGKeyArray,
    logits: Float[Array, "B V"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, B]:
    """Samples a symbol of each row.

    Args:
      key: randomness.
      logits: scores of the symbols; those beyond the data's vocabulary are never chosen.
      temperature: the logits are divided by it; 0 takes the likeliest symbol.
      top_k: keep this many of the likeliest symbols (more on a tie).
      top_p: keep the fewest likeliest symbols whose probabilities, after temperature and top_k,
        sum to at least this (nucleus sampling, Holtzman et al. 2020).
    """
    logits = jnp.where(jnp.arange(logits.shape[-1]) < VOCAB_SIZE, logits, -jnp.inf)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < VOCAB_SIZE:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None and top_p < 1:
        ordered = jnp.sort(logits, -1, descending=True)
        probabilities = jax.nn.softmax(ordered)
        before = probabilities.cumsum(-1) - probabilities
        least = jnp.where(before < top_p, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits)


def _check(config: GenerateConfig) -> None:
    problems = {
        "length": (config.length, config.length >= 1, "at least 1"),
        "temperature": (config.temperature, config.temperature >= 0, "0 or more"),
        "top_k": (config.top_k, config.top_k is None or config.top_k >= 1, "at least 1"),
        "top_p": (
            config.top_p,
            config.top_p is None or 0 < config.top_p <= 1,
            "above 0 and at most 1",
        ),
    }
    for name, (value, right, must) in problems.items():
        if not right:
            raise ExperimentError(f"{name}: {value}; it must be {must}", USAGE)


def _whole_characters(data: bytes) -> tuple[str, bytes]:
    """The text of all but an unfinished character at the end, and the rest."""
    for cut in range(min(3, len(data)) + 1):
        head, tail = data[: len(data) - cut], data[len(data) - cut :]
        try:
            return head.decode(), tail
        except UnicodeDecodeError as error:
            if error.end != len(head) or error.reason != "unexpected end of data":
                break
    return data.decode(errors="replace"), b""


if __name__ == "__main__":
    run_command(main)
