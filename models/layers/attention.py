"""Multi-head self-attention in which the mechanism is a name of the catalogue."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int

from attention import catalogue
from attention.positions import init_lrpe_theta, lrpe, rope
from models.checks import check_choice, check_inputs, check_positive
from models.layers.initializers import KERNEL_INIT
from models.layers.norm import NormKind, RMSNorm, SRMSNorm

Positions = Literal["rope", "lrpe"]
Activation = Literal["silu"]

# What the layer passes by itself, or what would change the form of the result.
_RESERVED = frozenset(
    "state query key value is_causal segment_ids initial_state return_state return_residual".split()
)
_BOTH = frozenset({"self causal", "self non-causal"})


class AttentionLayer(nnx.Module):
    """Self-attention between projections: `out(gate * norm(mechanism(query, key, value)))`.

    For input x [B, T, D], with N query heads and K key heads of H channels, and K value heads of V:

    1. `query`, `key`, `value` project x to N * H, K * H and K * V channels;
    2. `query_key_activation` is applied to queries and keys;
    3. `positions` turns queries and keys: "rope" by rotary embedding, "lrpe" by LRPE-d, which
       doubles their channels; its angles `theta` [K, H] are learned, and shared within a group;
    4. the mechanism gives [B, T, N * V];
    5. `output_norm` normalises over all N * V channels;
    6. `output_gate` multiplies by a further linear projection of x, `gate`, with no activation;
    7. `out` projects back to D channels.

    The defaults are plain multi-head attention. The gated linear attention (GLA) of TransNormerLLM
    (Qin et al., Scaling TransNormer to 175 Billion Parameters, 2023, and its released models) is
    `mechanism="lightning_attention"`, `options={"slopes": ...}`, `query_key_activation="silu"`,
    `output_norm="srms"`, `output_gate=True`, and `positions="lrpe"` in the first layer.

    A mechanism with one query for all tokens (Aaren) gets it from a learned input, `query_token`.

    LRPE doubles the channels of queries and keys but keeps their norms, so a mechanism that by
    default divides scores by the root of the channels it sees is passed `scale = 1 / sqrt(H)`.

    Args:
      features: D, channels of input and output.
      num_heads: N.
      num_kv_heads: K, which must divide N; query head n attends with key head n // (N / K). None
        for N.
      head_dim: H; None for D / N.
      value_dim: V; None for H.
      mechanism: slug of a mechanism of the catalogue that does self-attention of queries, keys and
        values and has no weights.
      is_causal: whether a token sees only itself and those before it; True by default.
      options: keyword arguments for the mechanism, such as `slopes`, `scale`, `logits_soft_cap` or
        `implementation`. They are static, so they must be hashable (lists become tuples); arrays go
        into the call's `options`.
      query_key_activation: None or "silu".
      positions: None, "rope" or "lrpe".
      rope_base: ratio of RoPE's longest wavelength to its shortest, nearly.
      output_norm: None, "rms" (with a learned gain) or "srms" (without).
      output_gate: whether there is a gate.
      use_bias: whether the projections have biases, which start at 0.
      dtype: dtype of computation and output; None for that of input and parameters together.
        Angles, norms, scores and states are float32 in any case.
      param_dtype: dtype of the parameters; float32 by default.
      kernel_init: initialiser of the projections; `KERNEL_INIT` by default.
      out_kernel_init: initialiser of `out`; None for `kernel_init`.
      rngs: the initialisers draw from its `params` stream.

    Raises:
      ValueError: the mechanism is unknown, has weights of its own, takes other arrays than queries,
        keys and values or does not support `is_causal`; an option is not one of the mechanism's;
        heads do not divide; a choice is unknown.
      TypeError: a size is not an integer or an option is not hashable.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        mechanism: str = "softmax_attention",
        is_causal: bool = True,
        options: Mapping[str, Any] | None = None,
        query_key_activation: Activation | None = None,
        positions: Positions | None = None,
        rope_base: float = 10_000.0,
        output_norm: NormKind | None = None,
        output_gate: bool = False,
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = KERNEL_INIT,
        out_kernel_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive(features=features, num_heads=num_heads, num_kv_heads=num_kv_heads)
        head_dim = default_head_dim(features, num_heads) if head_dim is None else head_dim
        value_dim = head_dim if value_dim is None else value_dim
        check_positive(head_dim=head_dim, value_dim=value_dim)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads: {num_kv_heads} must divide the {num_heads} heads of num_heads"
            )
        if positions == "rope" and head_dim % 2:
            raise ValueError(f"head_dim: {head_dim} must be even for positions='rope'")
        check_choice("query_key_activation", query_key_activation, (None, *get_args(Activation)))
        check_choice("positions", positions, (None, *get_args(Positions)))
        check_choice("output_norm", output_norm, (None, *get_args(NormKind)))
        record = catalogue.get(mechanism)
        _check_mechanism(record, is_causal, positions)
        options = static_options(options)
        check_options(record.function, dict(options))

        self.features = features
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.value_dim = value_dim
        self.mechanism = mechanism
        self.is_causal = is_causal
        self.options = options
        self.query_key_activation = query_key_activation
        self.positions = positions
        self.rope_base = rope_base
        self.output_norm = output_norm
        self.output_gate = output_gate
        self.dtype = dtype
        self.param_dtype = param_dtype

        if record.one_query:
            token = jax.random.normal(rngs.params(), (features,), param_dtype)
            self.query_token = nnx.Param(token)
        linear = functools.partial(
            nnx.Linear, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        inner = num_heads * value_dim
        self.query = linear(features, num_heads * head_dim, kernel_init=kernel_init)
        self.key = linear(features, num_kv_heads * head_dim, kernel_init=kernel_init)
        self.value = linear(features, num_kv_heads * value_dim, kernel_init=kernel_init)
        self.out = linear(inner, features, kernel_init=out_kernel_init or kernel_init)
        if output_gate:
            self.gate = linear(features, inner, kernel_init=kernel_init)
        if positions == "lrpe":
            theta = init_lrpe_theta(num_kv_heads, head_dim)
            self.theta = nnx.Param(theta.astype(param_dtype))
        if output_norm == "rms":
            self.norm = RMSNorm(inner, param_dtype=param_dtype, rngs=rngs)
        elif output_norm == "srms":
            self.norm = SRMSNorm(inner, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, " T"] | Int[Array, "B T"] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attends over whole sequences.

        Args:
          x: the inputs.
          segment_ids: document of every token; tokens attend within their document only.
          positions: position of every token; None for 0..T-1.
          options: further keyword arguments for the mechanism, over those of the constructor;
            arrays are allowed.

        Raises:
          ValueError: a shape does not fit, an option is not one of the mechanism's, positions are
            given to a layer that has none, or segments to a mechanism that takes none.
        """
        check_inputs(x, self.features)
        record = self._record
        check_options(record.function, options or {})
        keywords = self._keywords | dict(options or {})
        if _BOTH <= record.patterns:
            keywords["is_causal"] = self.is_causal
        if segment_ids is not None:
            if not record.takes_segments:
                raise ValueError(f"segment_ids: {self.mechanism} takes no packed documents")
            keywords["segment_ids"] = segment_ids
        query, key, value = self.heads(x, positions)
        return self._project_out(x, self._attend(query, key, value, keywords))

    def _attend(
        self, query: Array, key: Array, value: Array, keywords: Mapping[str, Any]
    ) -> Float[Array, "B T N V"]:
        """What the mechanism makes of whole sequences; layers that add to it do it here."""
        return self._record.function(query, key, value, **keywords)

    def init_state(self, batch: int, max_length: int, dtype: Dtype | None = None) -> Any:
        """The mechanism's state before the first token, for `step`.

        Args:
          batch: B.
          max_length: the most tokens that will be seen; only a cache needs it.
          dtype: dtype of cached keys and values; None for that of the computation.

        Raises:
          ValueError: the layer is not causal or the mechanism has no step form.
        """
        record = self._step_record()
        key_dim = self.head_dim * (2 if self.positions == "lrpe" else 1)
        dtype = dtype or self.dtype or self.param_dtype
        sizes = batch, max_length, self.num_heads, self.num_kv_heads, key_dim, self.value_dim
        own = {name: x for name, x in self.options if accepts(record.init_state, name)}
        return record.init_state(*sizes, dtype, **own)

    def step(
        self, x: Float[Array, "B T D"], state: Any, position: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Attends from T >= 1 new tokens to themselves and all before them, whose state is given.

        Args:
          x: the new inputs.
          state: from `init_state` or the step before.
          position: position of the first of the new tokens: the number of tokens before it.

        Returns:
          The outputs, the same as `__call__` on the whole sequence, and the state after them.

        Raises:
          ValueError: as `init_state`, or the step form lacks an option that the layer was given.
        """
        check_inputs(x, self.features)
        record = self._step_record()
        positions = position + jnp.arange(x.shape[1])
        query, key, value = self.heads(x, None if self.positions is None else positions)
        out, state = record.step(state, query, key, value, **self._keywords)
        return self._project_out(x, out), state

    @property
    def _record(self) -> catalogue.Mechanism:
        return catalogue.get(self.mechanism)

    @property
    def _keywords(self) -> dict[str, Any]:
        keywords = dict(self.options)
        scale = inspect.signature(self._record.function).parameters.get("scale")
        if self.positions == "lrpe" and scale is not None and scale.default is None:
            keywords.setdefault("scale", self.head_dim**-0.5)
        return keywords

    def _step_record(self) -> catalogue.Mechanism:
        record = self._record
        if not self.is_causal:
            raise ValueError("is_causal: False, but only a causal layer has a step form")
        if record.step is None:
            raise ValueError(f"mechanism: {self.mechanism!r} has no step form")
        check_options(record.step, dict(self.options))
        return record

    def heads(self, x: Array, positions: Array | None = None) -> tuple[Array, Array, Array]:
        """Queries, keys and values of inputs, as the mechanism is given them.

        Args:
          x: the inputs.
          positions: position of every token; None for 0..T-1.

        Raises:
          ValueError: positions are given to a layer that has none.
        """
        if positions is not None and self.positions is None:
            raise ValueError("positions: this layer has no positions to apply them to")
        query = self.query(self.query_token[...][None, None] if self._record.one_query else x)
        query = query.reshape(*query.shape[:2], -1, self.head_dim)
        key = self.key(x).reshape(*x.shape[:2], -1, self.head_dim)
        if self.query_key_activation == "silu":
            query, key = jax.nn.silu(query), jax.nn.silu(key)
        if self.positions == "rope":
            query = rope(query, positions, base=self.rope_base)
            key = rope(key, positions, base=self.rope_base)
        elif self.positions == "lrpe":
            theta = self.theta[...]
            group = self.num_heads // self.num_kv_heads
            query = lrpe(query, jnp.repeat(theta, group, axis=0), positions)
            key = lrpe(key, theta, positions)
        return query, key, self.value(x).reshape(*x.shape[:2], -1, self.value_dim)

    def _project_out(self, x: Array, out: Array) -> Array:
        out = out.reshape(*x.shape[:2], -1)
        if self.output_norm is not None:
            out = self.norm(out)
        if self.output_gate:
            out = self.gate(x) * out
        return self.out(out)


def default_head_dim(features: int, num_heads: int) -> int:
    """Channels of a head where the heads split the features evenly.

    Raises:
      ValueError: the heads do not divide the features.
    """
    if features % num_heads:
        raise ValueError(
            f"num_heads: {num_heads} must divide the {features} features, or head_dim be given"
        )
    return features // num_heads


def accepts(function: Callable, name: str) -> bool:
    """Whether a mechanism's function or step takes the keyword argument of that name."""
    return name in inspect.signature(function).parameters


def _check_mechanism(
    record: catalogue.Mechanism, is_causal: bool, positions: Positions | None
) -> None:
    if record.one_query and positions is not None:
        raise ValueError(
            f"positions: {positions!r}, but the query of {record.slug} has no position"
        )
    if record.arguments:
        raise ValueError(
            f"mechanism: {record.slug!r} takes {', '.join(record.inputs)}, not the queries, keys "
            "and values of this layer"
        )
    if record.has_weights:
        raise ValueError(
            f"mechanism: {record.slug!r} has weights of its own, which this layer does not hold"
        )
    wanted = "self causal" if is_causal else "self non-causal"
    if wanted not in record.patterns:
        raise ValueError(
            f"mechanism: {record.slug!r} does not support is_causal={is_causal}; it supports "
            f"{', '.join(sorted(record.patterns))}"
        )


def check_options(
    function: Callable, options: Mapping[str, Any], reserved: frozenset[str] = _RESERVED
) -> None:
    """Checks options that a layer was given for a mechanism's function or step.

    Args:
      function: of the mechanism.
      options: by name.
      reserved: names that the layer sets itself.

    Raises:
      ValueError: one is not free, or not one of the function's.
    """
    known = [name for name in inspect.signature(function).parameters if name not in reserved]
    for name in options:
        if name in reserved:
            raise ValueError(f"options: {name!r} is not free: the layer sets it")
        if name not in known:
            raise ValueError(
                f"options: {name!r} is not an option of {function.__name__}, which has "
                f"{', '.join(known)}"
            )


def static_options(options: Mapping[str, Any] | None) -> tuple[tuple[str, Hashable], ...]:
    """Options of a layer, sorted, as a static part of it.

    Raises:
      TypeError: one is not hashable.
    """
    return tuple((name, _static(name, x)) for name, x in sorted((options or {}).items()))


def _static(name: str, value: Any) -> Hashable:
    """The value with lists as tuples, so that the layer stays a static part of a jitted call."""
    if isinstance(value, list | tuple):
        return tuple(_static(name, item) for item in value)
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"options: {name!r} is a {type(value).__name__}, which is not hashable; give numbers, "
            "strings or tuples here, and arrays as `options` of the call"
        ) from None
    return value
