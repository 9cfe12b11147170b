"""The Mamba block: a gated selective scan between projections, behind a short convolution."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int

from attention.linear.selective_scan import (
    ScanState,
    init_selective_scan_state,
    selective_scan,
    selective_scan_step,
)
from attention.state import check_state
from models.checks import check_inputs, check_positive
from models.layers.attention import check_options, static_options
from models.layers.convolution import CausalDepthwiseConv
from models.layers.initializers import KERNEL_INIT

_OWN = frozenset("state x delta A B C D z delta_bias delta_softplus segment_ids".split())
_OWN |= {"initial_state", "return_state"}

DELTA_RANGE = (1e-3, 1e-1)
"""Steps at the start, spread evenly in their logarithm between the channels."""
DELTA_FLOOR = 1e-4
"""The smallest step at the start."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MambaState:
    """What a `MambaBlock` carries from token to token; its size does not depend on their number.

    Attributes:
      convolution: the last inputs of the convolution.
      scan: the state of the selective scan.
    """

    convolution: Float[Array, "B width-1 E"]
    scan: ScanState


class MambaBlock(nnx.Module):
    """A causal token mixer: `out_proj(selective_scan(silu(conv(u)), ...) * silu(z))`.

    For input x [B, T, D], with E = expansion * D inner channels, N numbers of state for each of
    them and steps of rank R:

    1. `in_proj` projects x to u and z, E channels each;
    2. `conv` convolves u causally, channel by channel, and silu is applied;
    3. `x_proj` projects u to a step of R channels, B and C of N channels; `dt_proj` projects the
       step to E channels;
    4. `attention.selective_scan` of u, by rates A = -exp(`A_log`), with `D` and `dt_bias`, is gated
       by silu(z);
    5. `out_proj` projects back to D channels.

    At the start A = -(1 .. N) in every channel, D = 1, `dt_proj` is uniform in +-R^-0.5, and
    `dt_bias` is what softplus takes to a step that is random in `DELTA_RANGE`, its logarithm
    uniform. The original trains `A_log` and `D` without weight decay.

    Source: Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces (2023).

    Args:
      features: D, channels of input and output.
      expansion: E / D; 2 by default.
      state_size: N; 16 by default.
      rank: R; None for D / 16, rounded up.
      conv_width: tokens that the convolution sees; 4 by default.
      use_bias: whether `in_proj` and `out_proj` have biases, which start at 0.
      conv_bias: whether the convolution has one; True by default.
      options: keyword arguments for `attention.selective_scan`: `implementation`, `chunk_size`.
      dtype: dtype of computation and output; None for that of input and parameters together. The
        scan is float32 in any case.
      param_dtype: dtype of the parameters; float32 by default.
      kernel_init: initialiser of `in_proj` and `x_proj`; `KERNEL_INIT` by default.
      out_kernel_init: initialiser of `out_proj`; None for `kernel_init`.
      rngs: the initialisers draw from its `params` stream.

    Raises:
      ValueError: a size is not positive, or an option is not one of the scan's.
      TypeError: a size is not an integer or an option is not hashable.
    """

    def __init__(
        self,
        features: int,
        *,
        expansion: int = 2,
        state_size: int = 16,
        rank: int | None = None,
        conv_width: int = 4,
        use_bias: bool = False,
        conv_bias: bool = True,
        options: Mapping[str, Any] | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = KERNEL_INIT,
        out_kernel_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        check_positive(features=features, expansion=expansion, state_size=state_size)
        rank = -(-features // 16) if rank is None else rank
        check_positive(rank=rank, conv_width=conv_width)
        self.options = static_options(options)
        check_options(selective_scan, dict(self.options), _OWN)
        inner = expansion * features
        self.features = features
        self.inner = inner
        self.state_size = state_size
        self.rank = rank
        self.dtype = dtype
        self.param_dtype = param_dtype

        linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.in_proj = linear(features, 2 * inner, use_bias=use_bias, kernel_init=kernel_init)
        self.conv = CausalDepthwiseConv(
            inner, conv_width, use_bias=conv_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.x_proj = linear(inner, rank + 2 * state_size, use_bias=False, kernel_init=kernel_init)
        # Uniform in +-rank^-0.5, as variance 1 / (3 rank) is.
        dt_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.dt_proj = linear(rank, inner, use_bias=False, kernel_init=dt_init)
        self.dt_bias = nnx.Param(_delta_bias(rngs.params(), inner, param_dtype))
        rates = jnp.log(jnp.arange(1, state_size + 1, dtype=jnp.float32))
        self.A_log = nnx.Param(jnp.tile(rates, (inner, 1)).astype(param_dtype))
        self.D = nnx.Param(jnp.ones((inner,), param_dtype))
        self.out_proj = linear(
            inner, features, use_bias=use_bias, kernel_init=out_kernel_init or kernel_init
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Float[Array, "B T D"]:
        """Mixes whole sequences.

        Args:
          x: the inputs.
          segment_ids: document of every token; tokens see their document only.
          options: further keyword arguments for the scan, over those of the constructor.

        Raises:
          ValueError: a shape does not fit, or an option is not one of the scan's.
        """
        check_inputs(x, self.features)
        check_options(selective_scan, options or {}, _OWN)
        u, z = jnp.split(self.in_proj(x), 2, axis=-1)
        u = jax.nn.silu(self.conv(u, segment_ids))
        keywords = dict(self.options) | dict(options or {})
        return self.out_proj(
            selective_scan(**self._scanned(u, z), segment_ids=segment_ids, **keywords)
        )

    def init_state(self, batch: int, max_length: int, dtype: Dtype | None = None) -> MambaState:
        """The state before the first token, for `step`.

        Args:
          batch: B.
          max_length: the most tokens that will be seen; the state does not depend on it.
          dtype: dtype of the inputs that the convolution keeps; None for that of the computation.
        """
        scan = init_selective_scan_state(
            batch, max_length, self.inner, self.state_size, self.dtype or self.param_dtype
        )
        return MambaState(self.conv.init_state(batch, dtype), scan)

    def step(
        self, x: Float[Array, "B T D"], state: MambaState, position: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], MambaState]:
        """Mixes T >= 1 new tokens with all before them, whose state is given.

        Args:
          x: the new inputs.
          state: from `init_state` or the step before.
          position: number of tokens before; nothing depends on it.

        Returns:
          The outputs, the same as `__call__` on the whole sequence, and the state after them.

        Raises:
          TypeError, ValueError: a shape or the state does not fit.
        """
        del position
        check_inputs(x, self.features)
        check_state(state, MambaState)
        u, z = jnp.split(self.in_proj(x), 2, axis=-1)
        u, convolution = self.conv.step(u, state.convolution)
        inputs = self._scanned(jax.nn.silu(u), z)
        y, scan = selective_scan_step(state.scan, **inputs, **dict(self.options))
        return self.out_proj(y), MambaState(convolution, scan)

    def _scanned(self, u: Array, z: Array) -> dict[str, Array]:
        """The arrays of the scan, from the convolved u and the gate z."""
        sizes = self.rank, self.rank + self.state_size
        delta, b, c = jnp.split(self.x_proj(u), sizes, axis=-1)
        wide = jnp.promote_types(self.param_dtype, jnp.float32)
        return dict(
            x=u,
            delta=self.dt_proj(delta),
            A=-jnp.exp(self.A_log[...].astype(wide)),
            B=b,
            C=c,
            D=self.D[...],
            z=z,
            delta_bias=self.dt_bias[...],
        )


def _delta_bias(key: Array, size: int, dtype: Dtype) -> Array:
    low, high = (math.log(x) for x in DELTA_RANGE)
    delta = jnp.exp(jax.random.uniform(key, (size,), jnp.float32, low, high))
    delta = jnp.maximum(delta, DELTA_FLOOR)
    return (delta + jnp.log(-jnp.expm1(-delta))).astype(dtype)
