"""What the implementations of scans are called with."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from pallas_kernels.partition import Axes


@dataclasses.dataclass(frozen=True)
class Options:
    """The static part of a call."""

    scan: str
    """"gated", "selective" or "softmax"."""
    chunk_size: int
    """How many tokens lie between the states that the forward keeps for the backward."""
    softplus: bool
    """Whether a selective scan's step is the softplus of what is given."""
    axes: Axes
    implementation: str | None
    """The one that serves the call; None for a choice by what the call is lowered for."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScanState:
    """What a gated or a selective scan carries from token to token.

    Attributes:
      hidden: the state h, float32 (float64 for float64 inputs).
    """

    hidden: Float[Array, "B D"] | Float[Array, "B N D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftmaxState:
    """What a softmax scan carries from token to token, float32 (float64 for float64 inputs).

    Attributes:
      maximum: the largest score, m; -inf before the first token.
      total: the sum u of exp(score - m).
      weighted: the sum w of exp(score - m) value.
    """

    maximum: Float[Array, "B N"]
    total: Float[Array, "B N"]
    weighted: Float[Array, "B N V"]


class Gated(NamedTuple):
    """The tokens of a gated scan."""

    x: Float[Array, "B T D"]
    log_decay: Float[Array, "B T D"]


class Selective(NamedTuple):
    """The tokens of a selective scan."""

    x: Float[Array, "B T D"]
    delta: Float[Array, "B T D"]
    b: Float[Array, "B T G N"]
    c: Float[Array, "B T G N"]


class Softmax(NamedTuple):
    """The tokens of a softmax scan."""

    score: Float[Array, "B T N"]
    value: Float[Array, "B T K V"]


class Parameters(NamedTuple):
    """What is the same for all tokens of a selective scan; the others have none.

    Under `jax.vmap` their batch may be 1 in the forward and whole in the backward, see `partition`.
    """

    a: Float[Array, "B|1 N D"] | None = None
    skip: Float[Array, "B|1 D"] | None = None
    bias: Float[Array, "B|1 D"] | None = None


class Inputs(NamedTuple):
    """The arrays of a call, checked."""

    tokens: Gated | Selective | Softmax
    parameters: Parameters
    begins: Bool[Array, "B T"] | None
    """Whether a token begins a segment, so that the state before it is dropped; False for token 0,
    which continues the initial state."""
    state: ScanState | SoftmaxState

    @property
    def dims(self) -> "Inputs":
        """Names the dimensions, as in `partition`."""
        tokens = self.tokens
        if isinstance(tokens, Gated):
            dims, state = Gated("btn", "btn"), ScanState("bn")
        elif isinstance(tokens, Softmax):
            dims, state = Softmax("btn", "btnv"), SoftmaxState("bn", "bn", "bnv")
        else:
            # One group serves all channels, wherever they are.
            group = "btns" if tokens.b.shape[2] > 1 else "bt+s"
            dims, state = Selective("btn", "btn", group, group), ScanState("bsn")
        parameters = (
            None if array is None else letters
            for array, letters in zip(self.parameters, ("+sn", "+n", "+n"), strict=True)
        )
        begins = None if self.begins is None else "bt"
        return Inputs(dims, Parameters(*parameters), begins, state)

    @property
    def results(self) -> tuple[str, Any]:
        """Names the dimensions of the output and of the last state."""
        return "btnv" if isinstance(self.tokens, Softmax) else "btn", self.dims.state

    @property
    def guides(self) -> tuple[int, int]:
        """Returns which of the tokens' arrays decide, for `partition`, what is sharded."""
        grouped = isinstance(self.tokens, Selective) and self.tokens.b.shape[2] > 1
        return (0, 2) if grouped else (0, 1)

    @property
    def out(self) -> jax.ShapeDtypeStruct:
        """Returns the type of the output."""
        tokens = self.tokens
        if isinstance(tokens, Softmax):
            shape = *tokens.score.shape, tokens.value.shape[3]
            return jax.ShapeDtypeStruct(shape, tokens.value.dtype)
        return jax.ShapeDtypeStruct(tokens.x.shape, tokens.x.dtype)

    @property
    def accumulator(self) -> DTypeLike:
        """Returns the dtype of states and sums."""
        return jnp.promote_types(self.out.dtype, jnp.float32)


def kept_dims(state: Any) -> Any:
    """Returns the dimensions of the states before all chunks, from those of one state."""
    return jax.tree.map(lambda dims: dims[0] + "c" + dims[1:], state)


def per_channel(array: Float[Array, "... G N"], channels: int) -> Float[Array, "... N D"]:
    """Returns a group's vectors for each of its channels."""
    array = jnp.swapaxes(array, -1, -2)
    return jnp.repeat(array, channels // array.shape[-1], axis=-1)


def join(left: SoftmaxState, right: SoftmaxState, gap: Any = 0.0) -> SoftmaxState:
    """Returns the state of the tokens of both; of no tokens, (-inf, 0, 0), there is no NaN.

    The maximum is any number that keeps the exponentials in range, so its gradient is zero.

    Args:
      left: of earlier tokens.
      right: of later tokens.
      gap: is added to the maximum of `left`: -inf where it is dropped.
    """
    before = left.maximum + gap
    maximum = jax.lax.stop_gradient(jnp.maximum(before, right.maximum))
    finite = jnp.where(jnp.isneginf(maximum), 0, maximum)
    kept, added = jnp.exp(before - finite), jnp.exp(right.maximum - finite)
    return SoftmaxState(
        maximum,
        kept * left.total + added * right.total,
        kept[..., None] * left.weighted + added[..., None] * right.weighted,
    )


def read(state: SoftmaxState) -> Float[Array, "... V"]:
    """Returns the weighted mean of the values, zeros if there were none."""
    seen = state.total > 0
    total = jnp.where(seen, state.total, 1)
    return jnp.where(seen[..., None], state.weighted / total[..., None], 0)
