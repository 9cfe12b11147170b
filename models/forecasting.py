"""Forecasting of series: an encoder and a decoder that take trends off at every step."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from attention import series_decomposition
from models.checks import check_literals, check_positive
from models.language import Option
from models.layers.attention import AttentionLayer, default_head_dim
from models.layers.cross_attention import CrossAttentionLayer
from models.layers.feed_forward import FeedForward
from models.layers.initializers import KERNEL_INIT


@dataclasses.dataclass(frozen=True)
class ForecasterConfig:
    """An `Autoformer`. Every value is one of JSON.

    Raises:
      ValueError: a size is not positive, heads do not divide, there are more outputs than channels,
        or a choice is unknown.
      TypeError: a size is not an integer.
    """

    channels: int = 4
    """Columns of the series."""
    outputs: int | None = None
    """Columns that are forecast, the first ones; None: all."""
    horizon: int = 24
    """Times that are forecast."""
    label_length: int = 48
    """Last times of the inputs with which the decoder begins."""
    features: int = 32
    """Width of the model."""
    num_heads: int = 4
    """Heads of every attention layer."""
    encoder_layers: int = 2
    """Layers of the encoder."""
    decoder_layers: int = 1
    """Layers of the decoder."""
    hidden_features: int | None = None
    """Width inside the feed-forward; None: 4 of `features`."""
    window: int = 25
    """Times in the moving average that is the trend."""
    mechanism: str = "auto_correlation"
    """Name of the attention mechanism in the catalogue; it must have a non-causal form, and one for
    cross-attention or fit keys to queries."""
    options: dict[str, Option] = dataclasses.field(default_factory=dict, hash=False)
    """Further options of the mechanism, such as factor."""
    implementation: Literal["reference", "xla", "pallas_tpu", "pallas_gpu"] | None = None
    """Implementation of the mechanism; None: the best one for the platform."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the layers; parameters, norms, scores, sums of trends and the forecast are float32
    anyway."""

    def __post_init__(self) -> None:
        """Checks what does not depend on the mechanism."""
        check_literals(self)
        check_positive(
            channels=self.channels,
            outputs=self.output_channels,
            horizon=self.horizon,
            label_length=self.label_length,
            features=self.features,
            num_heads=self.num_heads,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.decoder_layers,
            hidden_features=self.hidden_channels,
            window=self.window,
        )
        default_head_dim(self.features, self.num_heads)
        if self.output_channels > self.channels:
            raise ValueError(
                f"outputs: {self.outputs} must be at most the {self.channels} channels"
            )

    @property
    def output_channels(self) -> int:
        """Columns that are forecast."""
        return self.channels if self.outputs is None else self.outputs

    @property
    def hidden_channels(self) -> int:
        """Width inside the feed-forward."""
        return 4 * self.features if self.hidden_features is None else self.hidden_features

    @property
    def compute_dtype(self) -> Dtype:
        """Dtype of the layers."""
        return jnp.dtype(self.dtype)

    @property
    def mixers(self) -> tuple[str, ...]:
        """Mechanism of every layer."""
        return (self.mechanism,) * (self.encoder_layers + self.decoder_layers)


def parameter_count(config: ForecasterConfig) -> int:
    """Number of parameters of `Autoformer(config)`."""
    model = nnx.eval_shape(lambda: Autoformer(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


class SeasonalNorm(nnx.LayerNorm):
    """LayerNorm less its mean over time, so that every channel of the result has the mean 0.

    Computed in float32 or better; the result has the dtype of the input.

    Args:
      features: channels of the last axis.
      rngs: not drawn from, as gain and bias start at 1 and 0.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        super().__init__(features, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalises."""
        y = super().__call__(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        return (y - y.mean(axis=1, keepdims=True)).astype(x.dtype)


class EncoderLayer(nnx.Module):
    """`x = season(x + attention(x))`, then `x = season(x + feed_forward(x))`.

    Args:
      config: configuration of the model.
      rngs: the initialisers draw from its `params` stream.

    Raises:
      ValueError: as `AttentionLayer`.
    """

    def __init__(self, config: ForecasterConfig, *, rngs: nnx.Rngs):
        self.window = config.window
        self.attention = AttentionLayer(is_causal=False, **_attention(config), rngs=rngs)
        self.feed_forward = _feed_forward(config, rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the layer."""
        x, _ = series_decomposition(x + self.attention(x), self.window)
        return series_decomposition(x + self.feed_forward(x), self.window)[0]


class DecoderLayer(nnx.Module):
    """As `EncoderLayer` with cross-attention between; what the three seasons leave is the trend.

    Args:
      config: configuration of the model.
      rngs: the initialisers draw from its `params` stream.

    Raises:
      ValueError: as `AttentionLayer`.
    """

    def __init__(self, config: ForecasterConfig, *, rngs: nnx.Rngs):
        self.window = config.window
        self.attention = AttentionLayer(is_causal=False, **_attention(config), rngs=rngs)
        self.cross_attention = CrossAttentionLayer(**_attention(config), rngs=rngs)
        self.feed_forward = _feed_forward(config, rngs)
        self.trend = _circular(config.features, config.output_channels, jnp.float32, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], memory: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T outputs"]]:
        """Returns the seasonal part and what is added to the forecast's trend."""
        x, first = series_decomposition(x + self.attention(x), self.window)
        x, second = series_decomposition(x + self.cross_attention(x, memory), self.window)
        x, third = series_decomposition(x + self.feed_forward(x), self.window)
        return x, self.trend(sum(trend.astype(jnp.float32) for trend in (first, second, third)))


class Autoformer(nnx.Module):
    """Forecasts a series from its past: auto-correlation between series decompositions.

        memory = norm(encoder(embed(inputs)))
        season, trend = decomposition(inputs)
        x = embed(the last label_length times of season, then zeros)
        y = the last label_length times of trend, then the inputs' mean
        each layer of the decoder:  x, more = layer(x, memory);  y += more
        forecast = the last horizon times of head(norm(x)) + y

    Embeddings and the trends' projections are circular convolutions of three times, without bias;
    norms are `SeasonalNorm`. There are no positions: auto-correlation needs none, and with another
    mechanism order comes of convolutions and moving averages alone.

    Parameters are float32. Matrices start as `models.layers.initializers` says, biases at 0.

    Where the released code differs: it adds an embedding of the calendar, left out because a file's
    dates are not read; it has dropout, left out as in all models here; its gelu is the exact one;
    it chooses lags for the whole batch while training, `options={"lags": "batch"}`, which makes
    forecasts depend on their neighbours. Where only some columns are forecast, it adds the one
    seasonal part to the trends of all and takes the last.

    Source: Wu et al., Autoformer: Decomposition Transformers with Auto-Correlation for Long-Term
    Series Forecasting (2021).

    Args:
      config: the configuration.
      rngs: the initialisers draw from its `params` stream.

    Raises:
      ValueError: the mechanism is unknown, only causal, cannot attend to another sequence or has
        weights of its own; one of the options is not the mechanism's.
    """

    def __init__(self, config: ForecasterConfig, *, rngs: nnx.Rngs):
        self.config = config
        features, dtype = config.features, config.compute_dtype
        self.encoder_embed = _circular(config.channels, features, dtype, rngs)
        self.decoder_embed = _circular(config.channels, features, dtype, rngs)
        self.encoder = nnx.List(
            EncoderLayer(config, rngs=rngs) for _ in range(config.encoder_layers)
        )
        self.encoder_norm = SeasonalNorm(features, rngs=rngs)
        self.decoder = nnx.List(
            DecoderLayer(config, rngs=rngs) for _ in range(config.decoder_layers)
        )
        self.decoder_norm = SeasonalNorm(features, rngs=rngs)
        self.head = nnx.Linear(
            features, config.output_channels, dtype=jnp.float32, kernel_init=KERNEL_INIT, rngs=rngs
        )

    def __call__(self, inputs: Float[Array, "B T channels"]) -> Float[Array, "B horizon outputs"]:
        """The forecast, float32.

        Args:
          inputs: the series up to now, of label_length times or more.

        Raises:
          ValueError: a shape does not fit.
        """
        config = self.config
        if inputs.ndim != 3 or inputs.shape[2] != config.channels:
            raise ValueError(
                f"inputs: shape {inputs.shape} must be [batch, times, {config.channels}]"
            )
        skipped = inputs.shape[1] - config.label_length
        if skipped < 0:
            raise ValueError(
                f"inputs: {inputs.shape[1]} times, but label_length is {config.label_length}"
            )
        inputs = inputs.astype(jnp.float32)
        memory = self.encoder_embed(inputs)
        for layer in self.encoder:
            memory = layer(memory)
        memory = self.encoder_norm(memory)

        season, trend = series_decomposition(inputs, config.window)
        after = (0, 0), (0, config.horizon), (0, 0)
        mean = inputs.mean(axis=1, keepdims=True)
        mean = jnp.broadcast_to(mean, (mean.shape[0], config.horizon, mean.shape[2]))
        trend = jnp.concatenate([trend[:, skipped:], mean], axis=1)[..., : config.output_channels]
        x = self.decoder_embed(jnp.pad(season[:, skipped:], after))
        for layer in self.decoder:
            x, more = layer(x, memory)
            trend = trend + more
        return (self.head(self.decoder_norm(x)) + trend)[:, -config.horizon :]


def _attention(config: ForecasterConfig) -> dict:
    """Returns the settings that self- and cross-attention share."""
    options = dict(config.options)
    if config.implementation is not None:
        options.setdefault("implementation", config.implementation)
    return {
        "features": config.features,
        "num_heads": config.num_heads,
        "mechanism": config.mechanism,
        "options": options,
        "use_bias": True,
        "dtype": config.compute_dtype,
    }


def _feed_forward(config: ForecasterConfig, rngs: nnx.Rngs) -> FeedForward:
    return FeedForward(
        config.features,
        config.hidden_channels,
        kind="gelu",
        dtype=config.compute_dtype,
        rngs=rngs,
    )


def _circular(inputs: int, outputs: int, dtype: Dtype, rngs: nnx.Rngs) -> nnx.Conv:
    """Returns a convolution of three times in which the last and the first are neighbours."""
    return nnx.Conv(
        inputs,
        outputs,
        kernel_size=(3,),
        padding="CIRCULAR",
        use_bias=False,
        dtype=dtype,
        kernel_init=KERNEL_INIT,
        rngs=rngs,
    )
