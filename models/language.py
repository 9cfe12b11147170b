"""Decoder language models from a typed configuration: pre-norm transformer and TransNormerLLM."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int

from attention import catalogue, transnormer_slopes
from models.checks import check_literals, check_positive
from models.layers.attention import (
    Activation,
    AttentionLayer,
    Positions,
    accepts,
    default_head_dim,
)
from models.layers.feed_forward import FeedForward, FeedForwardKind
from models.layers.initializers import EMBEDDING_INIT, KERNEL_INIT, residual_init
from models.layers.mixers import MIXERS
from models.layers.norm import NORMS, NormKind

Option = bool | int | float | str | None

# Settings of an attention layer that a model may give the layers of one mechanism for themselves.
_LAYER_SETTINGS = (
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "value_dim",
    "positions",
    "query_key_activation",
    "output_norm",
    "output_gate",
)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder language model. The defaults are a transformer; see also `transnormer_llm`.

    Every value is one of JSON.

    Raises:
      ValueError: a size is not positive, heads do not divide, or a choice is unknown.
      TypeError: a size is not an integer.
    """

    vocab_size: int = 257
    """Number of different tokens; 257 are the bytes and a separator."""
    features: int = 256
    """Width of the model."""
    num_layers: int = 4
    """Number of blocks, each attention and feed-forward."""
    num_heads: int = 4
    """Query heads of every attention layer."""
    num_kv_heads: int | None = None
    """Key and value heads, a divisor of num_heads; None: as many as num_heads."""
    head_dim: int | None = None
    """Channels of a head; None: features / num_heads."""
    mechanism: str = "softmax_attention"
    """Name of the attention mechanism in the catalogue; it must have a causal form. Or that of a
    mixer with weights of its own, such as base_conv."""
    layers: tuple[str, ...] = ()
    """Mechanisms or mixers of the layers where they differ, over and over until every layer has
    one; empty: `mechanism` in all."""
    options: dict[str, Option] = dataclasses.field(default_factory=dict, hash=False)
    """Further options of the mechanism, such as logits_soft_cap. NAME.option is for the layers of
    mechanism NAME alone, and may also be a setting of their attention layers, such as
    NAME.head_dim, NAME.value_dim or NAME.positions."""
    implementation: Literal["reference", "xla", "pallas_tpu", "pallas_gpu"] | None = None
    """Implementation of the mechanism; None: the best one for the platform."""
    positions: Positions | None = "rope"
    """What turns queries and keys by their positions: RoPE, LRPE (of learned angles) or nothing."""
    position_layers: Literal["all", "first"] = "all"
    """Layers in which `positions` applies."""
    rope_base: float = 10_000.0
    """Ratio of RoPE's longest wavelength to its shortest."""
    decay: Literal["alibi", "paper"] | None = "alibi"
    """Rule of TransNormerLLM's decay by layer and head, for mechanisms that have one (others ignore
    it): that of its released models or that of its paper; None: no decay."""
    query_key_activation: Activation | None = None
    """Function applied to queries and keys."""
    output_norm: NormKind | None = None
    """Norm of the attention output over all heads, before the gate."""
    output_gate: bool = False
    """Whether a linear projection of the layer's input multiplies the attention output."""
    norm: NormKind = "rms"
    """Norm before attention, feed-forward and head: with a learned gain (rms) or without (srms)."""
    feed_forward: FeedForwardKind = "swiglu"
    """Kind of feed-forward: gated with silu, gated with no activation, or gelu with no gate."""
    hidden_features: int | None = None
    """Width inside the feed-forward; None: 8/3 of `features`, rounded up to a multiple of 64 (4 of
    them for gelu)."""
    documents: Literal["apart", "together"] = "apart"
    """Whether documents that are packed into a row see each other: as mechanisms must that know no
    documents, such as routing_attention."""
    landmarks: int | None = None
    """Tokens between two landmarks: behind so many of a row comes a learned landmark, which
    landmark_attention needs in place of its every block_size-th token; None: none."""
    tie_embeddings: bool = False
    """Whether the head uses the embedding's weights."""
    scale_embedding: bool = False
    """Whether embeddings are multiplied by the square root of `features`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the computation; parameters, norms, scores, states and logits are float32 anyway."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass computes again instead of keeping: nothing, every block from its
    input, or everything but the products with weights."""
    scan_layers: bool = False
    """Whether layers of equal structure are one loop of the compiled program: it compiles faster
    when there are many, and needs memory for one more copy of the parameters and gradients."""

    def __post_init__(self) -> None:
        """Checks what does not depend on the mechanism."""
        object.__setattr__(self, "layers", tuple(self.layers))  # JSON has lists
        check_literals(self)
        check_positive(
            vocab_size=self.vocab_size,
            features=self.features,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_channels,
            hidden_features=self.hidden_channels,
        )
        for name in self.options:
            owner, dot, _ = name.rpartition(".")
            if dot and owner not in self.mixers:
                raise ValueError(
                    f"options: {name!r}, but no layer is {owner!r}; they are "
                    f"{', '.join(dict.fromkeys(self.mixers))}"
                )
        if self.landmarks is not None:
            check_positive(landmarks=self.landmarks)
            if "landmark_attention" not in self.mixers:
                raise ValueError("landmarks: are for landmark_attention, which no layer has")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads: {self.kv_heads} must divide the {self.num_heads} heads of num_heads"
            )

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_channels(self) -> int:
        """Channels of a head."""
        if self.head_dim is None:
            return default_head_dim(self.features, self.num_heads)
        return self.head_dim

    @property
    def hidden_channels(self) -> int:
        """Width inside the feed-forward."""
        if self.hidden_features is not None:
            return self.hidden_features
        if self.feed_forward == "gelu":
            return 4 * self.features
        return 64 * math.ceil(8 * self.features / (3 * 64))

    @property
    def compute_dtype(self) -> Dtype:
        """Dtype of the computation."""
        return jnp.dtype(self.dtype)

    @property
    def mixers(self) -> tuple[str, ...]:
        """Mechanism or mixer of every layer."""
        names = self.layers or (self.mechanism,)
        return tuple(names[layer % len(names)] for layer in range(self.num_layers))

    def layer_settings(self, layer: int) -> dict[str, Any]:
        """Settings of the attention layer of a layer of the model, counted from 0."""
        settings = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "positions": self.layer_positions(layer),
            "query_key_activation": self.query_key_activation,
            "output_norm": self.output_norm,
            "output_gate": self.output_gate,
        }
        own = self._own(layer)
        return settings | {name: own[name] for name in own.keys() & set(_LAYER_SETTINGS)}

    def layer_positions(self, layer: int) -> Positions | None:
        """What turns queries and keys in a layer, counted from 0."""
        shared = self.positions if layer == 0 or self.position_layers == "all" else None
        return self._own(layer).get("positions", shared)

    def layer_options(self, layer: int) -> dict[str, Any]:
        """Options of the mechanism in a layer, counted from 0."""
        options: dict[str, Any] = {}
        if self.implementation is not None:
            options["implementation"] = self.implementation
        takes_slopes = accepts(catalogue.get(self.mixers[layer]).function, "slopes")
        if takes_slopes and self.decay is not None:
            heads = self.layer_settings(layer)["num_heads"]
            options["slopes"] = transnormer_slopes(layer, self.num_layers, heads, self.decay)
        if self.landmarks is not None and self.mixers[layer] == "landmark_attention":
            options["block_size"] = self.landmarks + 1
        shared = {name: x for name, x in self.options.items() if "." not in name}
        own = {name: x for name, x in self._own(layer).items() if name not in _LAYER_SETTINGS}
        return options | shared | own

    def mixer_options(self, layer: int) -> dict[str, Any]:
        """Options of the mixer with weights of its own in a layer, counted from 0."""
        return {name: x for name, x in self.options.items() if "." not in name} | self._own(layer)

    def _own(self, layer: int) -> dict[str, Option]:
        """The options that are for a layer's mixer alone."""
        prefix = f"{self.mixers[layer]}."
        return {
            name.removeprefix(prefix): value
            for name, value in self.options.items()
            if name.startswith(prefix)
        }


def transformer(**overrides: Any) -> DecoderConfig:
    """A pre-norm transformer: RoPE, softmax attention, SwiGLU, RMSNorm, untied embeddings.

    Args:
      **overrides: fields of the configuration that differ.
    """
    return DecoderConfig(**overrides)


def transnormer_llm(**overrides: Any) -> DecoderConfig:
    """TransNormerLLM: gated lightning attention with decay, LRPE in layer 0, SGLU, SRMSNorm.

    Source: Qin et al., Scaling TransNormer to 175 Billion Parameters (2023), and the released
    models where the two differ. `mechanism="softmax_attention"` puts exact attention into the same
    model; it has no decay.

    Args:
      **overrides: fields of the configuration that differ.
    """
    fields = {
        "mechanism": "lightning_attention",
        "positions": "lrpe",
        "position_layers": "first",
        "decay": "alibi",
        "query_key_activation": "silu",
        "output_norm": "srms",
        "output_gate": True,
        "norm": "srms",
        "feed_forward": "sglu",
        "scale_embedding": True,
    }
    return DecoderConfig(**(fields | overrides))


def parameter_count(config: DecoderConfig) -> int:
    """Number of parameters of `DecoderLM(config)`; docs/models.md has the formula."""
    model = nnx.eval_shape(lambda: DecoderLM(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _mixer(
    config: DecoderConfig, layer: int, out_kernel_init: Initializer, rngs: nnx.Rngs
) -> nnx.Module:
    """What mixes the tokens of a layer: one of MIXERS, or a mechanism in an attention layer."""
    name, shared = config.mixers[layer], {"dtype": config.compute_dtype, "rngs": rngs}
    shared["out_kernel_init"] = out_kernel_init
    if name not in MIXERS:
        return AttentionLayer(
            config.features,
            mechanism=name,
            rope_base=config.rope_base,
            options=config.layer_options(layer),
            **config.layer_settings(layer),
            **shared,
        )
    options = config.mixer_options(layer)
    known = inspect.signature(MIXERS[name].__init__).parameters
    for option in options:
        if option not in known or option in shared:
            free = ", ".join(n for n in known if n not in ("self", "features", *shared))
            raise ValueError(f"options: {option!r} is not an option of {name}, which has {free}")
    if "num_heads" in known:
        options.setdefault("num_heads", config.num_heads)
    if "options" in known and config.implementation is not None:
        options.setdefault("options", {"implementation": config.implementation})
    return MIXERS[name](config.features, **options, **shared)


class DecoderBlock(nnx.Module):
    """`x += attention(norm(x))`, then `x += feed_forward(norm(x))`.

    Args:
      config: configuration of the model.
      layer: which of its layers this is, from 0.
      rngs: the initialisers draw from its `params` stream.

    Raises:
      ValueError: as `AttentionLayer`.
    """

    def __init__(self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs):
        norm, dtype = NORMS[config.norm], config.compute_dtype
        out_kernel_init = residual_init(config.num_layers)
        self.attention_norm = norm(config.features, rngs=rngs)
        self.attention = _mixer(config, layer, out_kernel_init, rngs)
        self.feed_forward_norm = norm(config.features, rngs=rngs)
        self.feed_forward = FeedForward(
            config.features,
            config.hidden_channels,
            kind=config.feed_forward,
            dtype=dtype,
            out_kernel_init=out_kernel_init,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        options: dict[str, Any] | None = None,
    ) -> Float[Array, "B T D"]:
        """Applies the block to whole sequences; the arguments are those of `AttentionLayer`."""
        normed = self.attention_norm(x)
        x = x + self.attention(normed, segment_ids=segment_ids, options=options)
        return x + self.feed_forward(self.feed_forward_norm(x))

    def step(
        self, x: Float[Array, "B T D"], state: Any, position: Int[Array, ""]
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Applies the block to new tokens; the arguments are those of `AttentionLayer.step`."""
        y, state = self.attention.step(self.attention_norm(x), state, position)
        x = x + y
        return x + self.feed_forward(self.feed_forward_norm(x)), state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderState:
    """What a model remembers of the tokens it has seen; its shapes never change."""

    position: Int[Array, ""]
    """Number of tokens seen, int32."""
    layers: tuple[Any, ...]
    """State of every layer's mechanism, such as a key-value cache or a linear-attention memory."""


class DecoderLM(nnx.Module):
    """A decoder language model: embedding, blocks, norm, head.

    Parameters are float32. Activations are of the configuration's dtype; norms, angles, scores,
    states, normalisers and logits are float32. Matrices start as `models.layers.initializers` says,
    gains at 1, LRPE's angles as `attention.positions.init_lrpe_theta` says.

    Args:
      config: the configuration.
      rngs: the initialisers draw from its `params` stream.

    Raises:
      ValueError: the mechanism is unknown, not causal or has weights of its own; one of the options
        is not the mechanism's.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        # Looked up in float32 and rounded afterwards, so that gradients of frequent tokens are
        # summed in float32.
        self.embed = nnx.Embed(
            config.vocab_size,
            config.features,
            embedding_init=EMBEDDING_INIT,
            rngs=rngs,
        )
        if config.landmarks is not None:
            self.landmark = nnx.Param(EMBEDDING_INIT(rngs.params(), (1, config.features)))
        self.layers = nnx.List(
            DecoderBlock(config, layer, rngs=rngs) for layer in range(config.num_layers)
        )
        self.final_norm = NORMS[config.norm](config.features, rngs=rngs)
        if not config.tie_embeddings:
            self.head = nnx.Linear(
                config.features,
                config.vocab_size,
                use_bias=False,
                dtype=config.compute_dtype,
                preferred_element_type=jnp.float32,
                kernel_init=KERNEL_INIT,
                rngs=rngs,
            )

    def __call__(
        self, tokens: Int[Array, "B T"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T vocab_size"]:
        """Logits of the token after each one, float32.

        Args:
          tokens: ids in [0, vocab_size); larger ones give NaN.
          segment_ids: document of every token; documents packed into one row do not see each other,
            unless the configuration lets them.

        Raises:
          ValueError: a shape does not fit.
          TypeError: tokens are not integers.
        """
        _check_tokens(tokens)
        if segment_ids is not None and segment_ids.shape != tokens.shape:
            raise ValueError(
                f"segment_ids: shape {segment_ids.shape} must be {tokens.shape}, that of tokens"
            )
        if self.config.documents == "together":
            segment_ids = None
        x, options = self._embed(tokens), {}
        if self.config.landmarks is not None:
            x, segment_ids, options = self._with_landmarks(x, segment_ids)
        for _, blocks in itertools.groupby(self.layers, _structure):
            x = self._apply(list(blocks), x, segment_ids, options)
        if self.config.landmarks is not None:
            x = x[:, ~options["is_landmark"][0]]
        return self._logits(x)

    def heads(self, tokens: Int[Array, "B T"]) -> list[tuple[Array, Array, Array]]:
        """Queries, keys and values of every attention layer, as its mechanism is given them.

        Args:
          tokens: ids in [0, vocab_size).

        Raises:
          ValueError: tokens are not [batch, tokens].
          TypeError: tokens are not integers.
        """
        _check_tokens(tokens)
        x, found = self._embed(tokens), []
        for block in self.layers:
            if isinstance(block.attention, AttentionLayer):
                found.append(block.attention.heads(block.attention_norm(x)))
            x = block(x)
        return found

    def init_state(self, batch: int, max_length: int) -> DecoderState:
        """The state before the first token.

        Args:
          batch: B.
          max_length: the most tokens that `step` will be given in all. A cache raises or, within a
            compiled program, gives NaN if they are more.

        Raises:
          ValueError: the mechanism has no step form.
        """
        check_positive(batch=batch, max_length=max_length)
        if self.config.landmarks is not None:
            max_length += max_length // self.config.landmarks
        layers = (layer.attention.init_state(batch, max_length) for layer in self.layers)
        return DecoderState(jnp.zeros((), jnp.int32), tuple(layers))

    def step(
        self, tokens: Int[Array, "B T"], state: DecoderState
    ) -> tuple[Float[Array, "B T vocab_size"], DecoderState]:
        """Logits after each of T >= 1 new tokens, and the state after all of them.

        A prompt goes in one call, then the tokens that are sampled one at a time; the logits are
        those that `__call__` gives on the whole sequence.

        Args:
          tokens: the new tokens.
          state: from `init_state` or the step before.

        Raises:
          ValueError: tokens are not [batch, tokens].
          TypeError: tokens are not integers.
        """
        _check_tokens(tokens)
        if self.config.landmarks is not None:
            return self._step_with_landmarks(self._embed(tokens), state)
        x, layers = self._through(self._embed(tokens), state.layers, state.position)
        return self._logits(x), DecoderState(state.position + tokens.shape[1], layers)

    def _through(
        self, x: Array, states: tuple[Any, ...], position: Array
    ) -> tuple[Array, tuple[Any, ...]]:
        """Takes new tokens through all layers, whose states are given."""
        after = []
        for block, state in zip(self.layers, states, strict=True):
            x, state = block.step(x, state, position)
            after.append(state)
        return x, tuple(after)

    def _with_landmarks(
        self, x: Array, segment_ids: Array | None
    ) -> tuple[Array, Array | None, dict[str, Any]]:
        """Puts landmarks behind tokens: embeddings, documents, and options that say where."""
        (batch, tokens, _), size = x.shape, self.config.landmarks
        count = tokens // size
        # A landmark comes from behind the rows: of each place, the token that stands there.
        place = np.arange(tokens + count)
        is_landmark = place % (size + 1) == size
        source = np.minimum(place - place // (size + 1), tokens - 1)
        if segment_ids is not None:
            segment_ids = segment_ids[:, source - is_landmark]
        landmark = self._scaled(self.landmark[...])
        x = jnp.where(is_landmark[:, None], landmark, x[:, source])
        where = np.broadcast_to(is_landmark, (batch, len(place)))
        return x, segment_ids, {"is_landmark": where, "num_landmarks": max(count, 1)}

    def _step_with_landmarks(self, x: Array, state: DecoderState) -> tuple[Array, DecoderState]:
        """Takes new tokens one by one, and a landmark where one is due."""
        size = self.config.landmarks
        landmark = jnp.broadcast_to(self._scaled(self.landmark[...]), (len(x), 1, x.shape[2]))

        def one(state: DecoderState, x: Array) -> tuple[DecoderState, Array]:
            count = state.position + 1
            place = state.position + state.position // size
            x, layers = self._through(x[:, None], state.layers, place)
            layers = jax.lax.cond(
                count % size == 0,
                lambda layers: self._through(landmark, layers, place + 1)[1],
                lambda layers: layers,
                layers,
            )
            return DecoderState(count, layers), self._logits(x)[:, 0]

        state, logits = jax.lax.scan(one, state, x.swapaxes(0, 1))
        return logits.swapaxes(0, 1), state

    def _embed(self, tokens: Array) -> Array:
        return self._scaled(self.embed(tokens))

    def _scaled(self, x: Array) -> Array:
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.features)
        return x.astype(self.config.compute_dtype)

    def _logits(self, x: Array) -> Array:
        x = self.final_norm(x)
        if not self.config.tie_embeddings:
            return self.head(x)
        embedding = self.embed.embedding[...].astype(x.dtype)
        return jnp.matmul(x, embedding.T, preferred_element_type=jnp.float32)

    def _apply(
        self,
        blocks: Sequence[DecoderBlock],
        x: Array,
        segment_ids: Array | None,
        landmarks: dict[str, Any],
    ) -> Array:
        """Applies blocks of equal structure, one after the other.

        They are one function of their parameters and of their slopes, the one option that differs
        between layers: so it is traced once, rematerialised as one, and can be scanned.
        """
        graph = nnx.graphdef(blocks[0])

        def apply(x: Array, layer: tuple[Any, dict[str, Array]]) -> tuple[Array, None]:
            parameters, options = layer
            block = nnx.merge(graph, parameters)
            if getattr(block.attention, "mechanism", None) == "landmark_attention":
                options = options | landmarks
            return block(x, segment_ids=segment_ids, options=options), None

        scan = self.config.scan_layers and len(blocks) > 1
        if self.config.remat != "none":
            # Within a scan nothing can be merged with the forward pass anyway.
            apply = jax.checkpoint(
                apply, policy=_REMAT_POLICIES[self.config.remat], prevent_cse=not scan
            )
        layers = [(nnx.state(block), _slopes(block)) for block in blocks]
        if scan:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
            return jax.lax.scan(apply, x, stacked)[0]
        for layer in layers:
            x, _ = apply(x, layer)
        return x


_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _structure(block: DecoderBlock) -> tuple[Any, ...]:
    """What differs between blocks of one model that are not of equal structure."""
    mixer = block.attention
    if isinstance(mixer, AttentionLayer):
        return mixer.mechanism, mixer.positions
    return (type(mixer),)


def _slopes(block: DecoderBlock) -> dict[str, np.ndarray]:
    slopes = dict(getattr(block.attention, "options", ())).get("slopes")
    return {} if slopes is None else {"slopes": np.asarray(slopes, np.float32)}


def _check_tokens(tokens: Array) -> None:
    if tokens.ndim != 2 or not tokens.shape[1]:
        raise ValueError(f"tokens: shape {tokens.shape} must be [batch, tokens], with tokens >= 1")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens: dtype {tokens.dtype} must be an integer type")
