"""Vision transformers from a typed configuration: of one stage, and pyramids of several."""

from __future__ import annotations

import functools
import itertools
import math

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from models.layers.feed_forward import FeedForward
from models.layers.initializers import KERNEL_INIT, residual_init
from models.layers.norm import NORMS, LayerNorm
from models.layers.vision_attention import GridAttentionLayer, depthwise
from models.vision_config import PyramidConfig, StageConfig, VisionNormKind, ViTConfig, stem_widths

VISION_NORMS: dict[VisionNormKind, type[nnx.Module]] = {"layer": LayerNorm, **NORMS}

# The paper's 0.02 can hardly be seen beside patches of unit variance: small models then learn far
# slower where a patch lies.
_TOKEN_INIT = nnx.initializers.normal(0.5)


class VisionBlock(nnx.Module):
    """`x += attention(norm(x))`, then `x += feed_forward(norm(x))`.

    Args:
      stage: the stage that it is of.
      config: the model.
      grid: height and width of the stage's tokens.
      class_token: whether there is a class token before them.
      num_layers: blocks of the model.
      rngs: the initialisers draw from its `params` stream.

    Raises:
      ValueError: as `GridAttentionLayer`.
    """

    def __init__(
        self,
        stage: StageConfig,
        config: ViTConfig | PyramidConfig,
        grid: tuple[int, int],
        *,
        class_token: bool = False,
        num_layers: int,
        rngs: nnx.Rngs,
    ):
        norm, dtype = VISION_NORMS[config.norm], config.compute_dtype
        shared = {
            "use_bias": True,
            "dtype": dtype,
            "out_kernel_init": residual_init(num_layers),
            "rngs": rngs,
        }
        options = dict(stage.options)
        if config.implementation is not None:
            options.setdefault("implementation", config.implementation)
        self.grid = grid
        self.post_norm = isinstance(config, PyramidConfig) and config.post_norm
        if stage.position_convolution is not None:
            self.position_convolution = depthwise(
                stage.features,
                stage.position_convolution,
                name="position_convolution",
                dtype=dtype,
                rngs=rngs,
            )
        self.attention_norm = norm(stage.features, rngs=rngs)
        self.attention = GridAttentionLayer(
            stage.features,
            stage.num_heads,
            num_kv_heads=stage.num_kv_heads,
            grid=grid,
            class_token=class_token,
            value_convolution=stage.value_convolution,
            agent_biases=stage.agent_biases,
            landmark_stride=stage.landmark_stride,
            mechanism=stage.mechanism,
            options=options,
            **shared,
        )
        self.feed_forward_norm = norm(stage.features, rngs=rngs)
        self.feed_forward = FeedForward(
            stage.features, stage.hidden_channels, kind=stage.feed_forward, **shared
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the block."""
        if hasattr(self, "position_convolution"):
            image = x.reshape(len(x), *self.grid, -1)
            x = x + self.position_convolution(image).reshape(x.shape)
        if self.post_norm:
            x = self.attention_norm(x + self.attention(x))
            return self.feed_forward_norm(x + self.feed_forward(x))
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class VisionTransformer(nnx.Module):
    """A vision transformer: patches, positions, blocks, norm, head.

    Parameters are float32. Activations are of the configuration's dtype; norms, scores, states,
    normalisers and logits are float32. Matrices start as `models.layers.initializers` says, gains
    at 1, biases at 0, positions and class token normal with a deviation of 0.5.

    Args:
      config: the configuration.
      rngs: the initialisers draw from its `params` stream.

    Raises:
      ValueError: the mechanism is unknown, only causal or has weights of its own, one of the
        options is not the mechanism's, or it is one on grids and there is a class token.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        size, dtype = config.patch_size, config.compute_dtype
        self.embed = _convolution(
            config.channels, config.features, size, stride=size, padding=0, dtype=dtype, rngs=rngs
        )
        if config.pooling == "class":
            token = _TOKEN_INIT(rngs.params(), (config.features,), jnp.float32)
            self.class_token = nnx.Param(token)
        if config.positions == "learned":
            shape = config.num_tokens, config.features
            self.positions = nnx.Param(_TOKEN_INIT(rngs.params(), shape, jnp.float32))
        self.layers = nnx.List(
            VisionBlock(
                config.stage,
                config,
                config.grid,
                class_token=config.pooling == "class",
                num_layers=config.num_layers,
                rngs=rngs,
            )
            for _ in range(config.num_layers)
        )
        self.final_norm = VISION_NORMS[config.norm](config.features, rngs=rngs)
        self.head = _head(config.features, config, rngs)

    def __call__(
        self, images: Float[Array, "B image_size image_size channels"]
    ) -> Float[Array, "B num_classes"]:
        """Logits of the classes, float32.

        Args:
          images: channels last, of values around 0.

        Raises:
          ValueError: the shape is not that of the configuration.
        """
        config = self.config
        _check_images(images, config)
        x = self.embed(images.astype(config.compute_dtype))
        x = x.reshape(len(x), -1, config.features)
        if config.pooling == "class":
            token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (len(x), 1, x.shape[2]))
            x = jnp.concatenate([token, x], axis=1)
        if config.positions == "learned":
            x = x + self.positions[...].astype(x.dtype)
        x = self.final_norm(_applied(self.layers, x, config))
        return self.head(x[:, 0] if config.pooling == "class" else _mean(x))


class PyramidTransformer(nnx.Module):
    """A hierarchical vision transformer, see `PyramidConfig`.

    Dtypes and initialisation are those of `VisionTransformer`.

    Args:
      config: the configuration.
      rngs: the initialisers draw from its `params` stream.

    Raises:
      ValueError: a mechanism is unknown, only causal or has weights of its own, or an option is
        not one of its own, or does not fit a stage's grid when the model is called.
    """

    def __init__(self, config: PyramidConfig, *, rngs: nnx.Rngs):
        self.config = config
        norm = VISION_NORMS[config.norm]
        convolution = functools.partial(
            _convolution, size=3, stride=2, padding=1, dtype=config.compute_dtype, rngs=rngs
        )
        widths = stem_widths(config)
        self.stem = nnx.List(convolution(a, b) for a, b in itertools.pairwise(widths))
        features = [stage.features for stage in config.stages]
        self.downsample = nnx.List(
            convolution(a, b, use_bias=False) for a, b in itertools.pairwise(features)
        )
        self.embed_norms = nnx.List(norm(width, rngs=rngs) for width in features)
        self.stages = nnx.List(
            nnx.List(
                VisionBlock(stage, config, grid, num_layers=len(config.mixers), rngs=rngs)
                for _ in range(stage.depth)
            )
            for stage, grid in zip(config.stages, config.grids, strict=True)
        )
        self.final_norm = norm(features[-1], rngs=rngs)
        self.head = _head(features[-1], config, rngs)

    def __call__(
        self, images: Float[Array, "B image_size image_size channels"]
    ) -> Float[Array, "B num_classes"]:
        """Logits of the classes, float32.

        Args:
          images: channels last, of values around 0.

        Raises:
          ValueError: the shape is not that of the configuration, or a mechanism's options do not
            fit a stage's grid.
        """
        config = self.config
        _check_images(images, config)
        x = images.astype(config.compute_dtype)
        for i, convolution in enumerate(self.stem):
            if i and config.stem_activation:
                x = nnx.gelu(x)
            x = convolution(x)
        for i, (blocks, grid) in enumerate(zip(self.stages, config.grids, strict=True)):
            if i:
                x = self.downsample[i - 1](x)
            tokens = self.embed_norms[i](x.reshape(len(x), math.prod(grid), -1))
            x = _applied(blocks, tokens, config).reshape(len(x), *grid, -1)
        return self.head(_mean(self.final_norm(x.reshape(len(x), -1, x.shape[-1]))))


def _convolution(
    channels: int,
    features: int,
    size: int,
    *,
    stride: int,
    padding: int,
    dtype: Dtype,
    rngs: nnx.Rngs,
    use_bias: bool = True,
) -> nnx.Conv:
    return nnx.Conv(
        channels,
        features,
        (size, size),
        strides=stride,
        padding=((padding, padding),) * 2,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=KERNEL_INIT,
        rngs=rngs,
    )


def _head(features: int, config: ViTConfig | PyramidConfig, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        features,
        config.num_classes,
        dtype=config.compute_dtype,
        preferred_element_type=jnp.float32,
        kernel_init=KERNEL_INIT,
        rngs=rngs,
    )


def _applied(blocks: nnx.List, x: Array, config: ViTConfig | PyramidConfig) -> Array:
    apply = nnx.remat(lambda block, x: block(x)) if config.remat else lambda block, x: block(x)
    for block in blocks:
        x = apply(block, x)
    return x


def _mean(x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
    return jnp.mean(x, axis=1, dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)


def _check_images(images: Array, config: ViTConfig | PyramidConfig) -> None:
    wanted = (config.image_size, config.image_size, config.channels)
    if images.ndim != 4 or images.shape[1:] != wanted:
        raise ValueError(f"images: shape {images.shape} must be [batch, *{wanted}]")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images: dtype {images.dtype} must be a floating type")
