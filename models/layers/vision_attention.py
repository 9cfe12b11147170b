"""Self-attention over the places of an image, and what vision models add to it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attention import catalogue
from models.checks import check_positive
from models.layers.attention import AttentionLayer, accepts
from models.layers.norm import LayerNorm


class GridAttentionLayer(AttentionLayer):
    """`AttentionLayer` over the tokens of a grid, in row-major order: not causal.

    A mechanism with an option `shape` (neighborhood, bi-level routing) gets the grid's sides by it.

    With `value_convolution` = k, a depthwise convolution of k x k places over the grid of values,
    with a bias, is added to what the mechanism gives, before the output projection:

        out(mechanism(query, key, value) + convolution(value))

    It is what BiFormer calls LePE (k = 5) and Agent Attention DWC (k = 3). Value heads that serve
    several query heads are repeated. A class token, which stands before the grid, is not convolved.

    Two mechanisms have weights of their own here:

    - `agent_attention` with `agent_biases`: learned biases of agents and tokens, and of tokens and
      agents, each a 7 x 7 table that is spread over the grid plus a value for its row and one for
      its column;
    - `soft_attention` with `landmark_stride` = r: keys are the queries, both divided by H^(1/4),
      and landmarks gelu(norm(c)) of a convolution c of queries over r x r places side by side, the
      same for all heads.

    Sources: Dong et al., CSWin Transformer (2021), for LePE; Zhu et al., BiFormer (2023); Han et
    al., Agent Attention (2023); Lu et al., SOFT (2021).

    Args:
      features: D.
      num_heads: N.
      grid: (height, width), whose product is the number of tokens, without the class token.
      class_token: whether the first token stands for the whole image; of mechanisms with a `shape`
        only for those with `prefix_tokens` too.
      value_convolution: k, an odd number; None for none.
      agent_biases: whether `agent_attention` has biases.
      landmark_stride: r, of `soft_attention`; None for landmarks without weights.
      options: of the mechanism, without `shape`.
      **settings: others of `AttentionLayer`.

    Raises:
      ValueError: k is not odd, there is a class token for a mechanism on grids, or as
        `AttentionLayer`.
      TypeError: as `AttentionLayer`.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        grid: tuple[int, int],
        class_token: bool = False,
        value_convolution: int | None = None,
        agent_biases: bool = False,
        landmark_stride: int | None = None,
        mechanism: str = "softmax_attention",
        options: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
        **settings: Any,
    ):
        height, width = grid
        check_positive(height=height, width=width)
        function, options = catalogue.get(mechanism).function, dict(options or {})
        for name, given, needed in (
            ("agent_biases", agent_biases, "agent_bias"),
            ("landmark_stride", landmark_stride, "landmarks"),
        ):
            if given and not accepts(function, needed):
                raise ValueError(f"{name}: {given}, but {mechanism} takes no {needed}")
        if accepts(function, "shape") and landmark_stride is None:
            options["shape"] = (height, width)
            if class_token and not accepts(function, "prefix_tokens"):
                raise ValueError(
                    f"mechanism: {mechanism} attends over a grid, which has no place for a class "
                    "token; pool by the mean"
                )
            if class_token:
                options["prefix_tokens"] = 1
        super().__init__(
            features,
            num_heads,
            mechanism=mechanism,
            options=options,
            is_causal=False,
            rngs=rngs,
            **settings,
        )
        self.grid = (height, width)
        self.class_token = class_token
        if value_convolution is not None:
            self.value_convolution = depthwise(
                self.num_kv_heads * self.value_dim,
                value_convolution,
                name="value_convolution",
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                rngs=rngs,
            )

        if agent_biases:
            count = options.get("num_agents") or (7, 7)
            agents = count**2 if isinstance(count, int) else math.prod(count)
            biases = functools.partial(
                AgentBias, num_heads, agents, grid, prefix=class_token, rngs=rngs
            )
            self.agent_bias, self.query_bias = biases(), biases()
        if landmark_stride is not None:
            check_positive(landmark_stride=landmark_stride)
            if self.num_kv_heads != num_heads or "scale" in options:
                raise ValueError(
                    "landmark_stride: keys are the queries then, and scaled: num_kv_heads must be "
                    "num_heads, and there is no option scale"
                )
            self.key = self.query
            self.landmarks = nnx.Conv(
                self.head_dim,
                self.head_dim,
                (landmark_stride, landmark_stride),
                strides=landmark_stride,
                padding="VALID",
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                rngs=rngs,
            )
            self.landmarks_norm = LayerNorm(self.head_dim, rngs=rngs)

    def _attend(
        self, query: Array, key: Array, value: Array, keywords: Mapping[str, Any]
    ) -> Float[Array, "B T N V"]:
        if hasattr(self, "agent_bias"):
            biases = {
                "agent_bias": self.agent_bias(),
                "query_bias": jnp.swapaxes(self.query_bias(), 1, 2),
            }
            keywords = {**keywords, **biases}
        if hasattr(self, "landmarks"):
            query = key = query * self.head_dim**-0.25
            keywords = {**keywords, "landmarks": self._landmarks(query), "scale": 1.0}
        out = super()._attend(query, key, value, keywords)
        if not hasattr(self, "value_convolution"):
            return out
        first = int(self.class_token)
        added = self.value_convolution(value[:, first:].reshape(len(value), *self.grid, -1))
        added = added.reshape(value[:, first:].shape)
        added = jnp.repeat(added, self.num_heads // self.num_kv_heads, axis=2)
        return out + jnp.pad(added, ((0, 0), (first, 0), (0, 0), (0, 0)))

    def _landmarks(self, query: Float[Array, "B T N H"]) -> Float[Array, "B m N H"]:
        image = query.reshape(len(query), *self.grid, *query.shape[2:])
        image = jnp.moveaxis(image, 3, 1)
        found = self.landmarks(image.reshape(-1, *image.shape[2:]))
        found = jax.nn.gelu(self.landmarks_norm(found), approximate=False)
        found = found.reshape(*image.shape[:2], -1, self.head_dim)
        return jnp.swapaxes(found, 1, 2)


class AgentBias(nnx.Module):
    """Learned biases of agents and the tokens of an image, see `attention.agent_biases`.

    Args:
      num_heads: N.
      num_agents: n.
      grid: height and width of the image.
      prefix: whether there is a class token before it.
      rngs: the initialisers draw from its `params` stream: normal, of a deviation of 0.02.
    """

    def __init__(
        self,
        num_heads: int,
        num_agents: int,
        grid: tuple[int, int],
        *,
        prefix: bool,
        rngs: nnx.Rngs,
    ):
        self.grid = tuple(grid)
        height, width = grid

        def normal(*shape: int) -> nnx.Param:
            draw = nnx.initializers.normal(0.02)
            return nnx.Param(draw(rngs.params(), (num_heads, num_agents, *shape), jnp.float32))

        self.table = normal(7, 7)
        self.rows = normal(height)
        self.columns = normal(width)
        if prefix:
            self.prefix = normal(1)

    def __call__(self) -> Float[Array, "N n T"]:
        """The bias."""
        biases = catalogue.get("agent_attention").exports["agent_biases"]
        prefix = self.prefix[...] if hasattr(self, "prefix") else None
        return biases(self.table[...], self.rows[...], self.columns[...], prefix, shape=self.grid)


def depthwise(channels: int, size: int, *, name: str, rngs: nnx.Rngs, **dtypes: Any) -> nnx.Conv:
    """A convolution of each channel by itself, over size x size places, with a bias.

    Args:
      channels: their number.
      size: an odd number; places beyond the image are 0.
      name: of the size, for messages.
      rngs: the initialisers draw from its `params` stream.
      **dtypes: `dtype` and `param_dtype`.

    Raises:
      ValueError: the size is not odd.
    """
    check_positive(**{name: size})
    if not size % 2:
        raise ValueError(f"{name}: {size} must be odd")
    return nnx.Conv(
        channels, channels, (size, size), feature_group_count=channels, rngs=rngs, **dtypes
    )
