"""Configurations of vision transformers: of one stage, pyramids of several, and published ones."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Literal

import jax.numpy as jnp
from flax.typing import Dtype

from models.checks import check_literals, check_positive
from models.layers.attention import default_head_dim
from models.layers.feed_forward import FeedForwardKind

Option = bool | int | float | str | tuple[int, ...] | None
VisionNormKind = Literal["layer", "rms", "srms"]
Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """Blocks of one width, on one grid.

    Raises:
      ValueError: a size is not positive, heads do not divide, or a choice is unknown.
      TypeError: a size is not an integer.
    """

    depth: int = 2
    """Number of blocks, each attention and feed-forward."""
    features: int = 64
    """Width of the blocks."""
    num_heads: int = 2
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads, a divisor of num_heads; None: as many as num_heads."""
    mechanism: str = "softmax_attention"
    """Name of the attention mechanism in the catalogue; it must have a form that is not causal."""
    options: dict[str, Option] = dataclasses.field(default_factory=dict, hash=False)
    """Further options of the mechanism, such as window; a `shape` is given by the model."""
    value_convolution: int | None = None
    """Side of a depthwise convolution of the values that is added to attention; None: none."""
    agent_biases: bool = False
    """Whether agent_attention has learned biases of agents and tokens."""
    landmark_stride: int | None = None
    """Side of the patches of which a convolution makes the landmarks of soft_attention, whose keys
    are its queries then; None: landmarks are means, and keys their own."""
    position_convolution: int | None = None
    """Side of a depthwise convolution that is added to the tokens before each block; None: none."""
    feed_forward: FeedForwardKind = "gelu"
    """Kind of feed-forward: gelu with no gate, or gated with silu or no activation."""
    hidden_features: int | None = None
    """Width inside the feed-forward; None: 4 times `features`."""

    def __post_init__(self) -> None:
        """Checks what does not depend on the mechanism."""
        check_literals(self)
        check_positive(
            depth=self.depth,
            features=self.features,
            num_heads=self.num_heads,
            num_kv_heads=self.kv_heads,
            hidden_features=self.hidden_channels,
        )
        default_head_dim(self.features, self.num_heads)

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def hidden_channels(self) -> int:
        """Width inside the feed-forward."""
        return 4 * self.features if self.hidden_features is None else self.hidden_features

    def parameter_count(
        self, norm: VisionNormKind, grid: tuple[int, int], class_token: bool = False
    ) -> int:
        """Number of parameters of its blocks on a grid."""
        d, f = self.features, self.hidden_channels
        kv = d // self.num_heads * self.kv_heads
        attention = 2 * d * (d + 1) + 2 * kv * (d + 1)
        matrices = 1 if self.feed_forward == "gelu" else 2
        feed_forward = matrices * f * (d + 1) + d * (f + 1)
        convolutions = 0
        if self.value_convolution is not None:
            convolutions += kv * (self.value_convolution**2 + 1)
        if self.position_convolution is not None:
            convolutions += d * (self.position_convolution**2 + 1)
        if self.landmark_stride is not None:
            h = d // self.num_heads
            attention += (h * self.landmark_stride) ** 2 + 2 * h - d * (d + 1)
        if self.agent_biases:
            agents = self.options.get("num_agents", 7)
            agents = agents**2 if isinstance(agents, int) else math.prod(agents)
            attention += 2 * self.num_heads * agents * (49 + sum(grid) + class_token)
        return self.depth * (attention + feed_forward + convolutions + 2 * _norm_size(norm, d))


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A vision transformer of one stage: patches, positions, pre-norm blocks, head.

    Every value is one of JSON. Source: Dosovitskiy et al., An Image is Worth 16x16 Words (2020).

    Raises:
      ValueError: a size is not positive, patches or heads do not divide, or a choice is unknown.
      TypeError: a size is not an integer.
    """

    image_size: int = 8
    """Height and width of the images."""
    channels: int = 1
    """Channels of the images."""
    num_classes: int = 10
    """Number of classes."""
    patch_size: int = 2
    """Height and width of a patch, a divisor of image_size."""
    features: int = 64
    """Width of the model."""
    num_layers: int = 4
    """Number of blocks."""
    num_heads: int = 4
    """Query heads of every attention layer."""
    num_kv_heads: int | None = None
    """Key and value heads, a divisor of num_heads; None: as many as num_heads."""
    mechanism: str = "softmax_attention"
    """Name of the attention mechanism in the catalogue; it must have a form that is not causal."""
    options: dict[str, Option] = dataclasses.field(default_factory=dict, hash=False)
    """Further options of the mechanism; a `shape` is given by the model."""
    implementation: Implementation | None = None
    """Implementation of the mechanism; None: the best one for the platform."""
    pooling: Literal["class", "mean"] = "class"
    """What the head reads: a token of its own, before the patches, or the mean of the patches.
    Mechanisms on grids take "mean", but for agent_attention."""
    positions: Literal["learned", "none"] = "learned"
    """What is added to the tokens: a learned table, or nothing."""
    value_convolution: int | None = None
    """Side of a depthwise convolution of the values that is added to attention; None: none."""
    agent_biases: bool = False
    """Whether agent_attention has learned biases of agents and tokens."""
    norm: VisionNormKind = "layer"
    """Norm before attention, feed-forward and head."""
    feed_forward: FeedForwardKind = "gelu"
    """Kind of feed-forward."""
    hidden_features: int | None = None
    """Width inside the feed-forward; None: 4 times `features`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the computation; parameters, norms, scores, states and logits are float32 anyway."""
    remat: bool = False
    """Whether the backward pass computes every block again from its input."""

    def __post_init__(self) -> None:
        """Checks what does not depend on the mechanism."""
        check_literals(self)
        check_positive(
            image_size=self.image_size,
            channels=self.channels,
            num_classes=self.num_classes,
            patch_size=self.patch_size,
            num_layers=self.num_layers,
        )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size: {self.patch_size} must divide image_size, {self.image_size}"
            )
        _ = self.stage

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in a column and in a row."""
        return (self.image_size // self.patch_size,) * 2

    @property
    def num_tokens(self) -> int:
        """Tokens of an image: patches, and the class token."""
        return math.prod(self.grid) + (self.pooling == "class")

    @property
    def stage(self) -> StageConfig:
        """The blocks."""
        shared = {field.name for field in dataclasses.fields(StageConfig)} - {"depth"}
        fields = {name: getattr(self, name) for name in shared if hasattr(self, name)}
        return StageConfig(depth=self.num_layers, **fields)

    @property
    def mixers(self) -> tuple[str, ...]:
        """The mechanism of every layer."""
        return (self.mechanism,) * self.num_layers

    @property
    def compute_dtype(self) -> Dtype:
        """Dtype of the computation."""
        return jnp.dtype(self.dtype)


@dataclasses.dataclass(frozen=True)
class PyramidConfig:
    """A hierarchical vision transformer: from stage to stage half the grid, and a wider model.

    A stem of 3 x 3 convolutions, each of stride 2, and a norm make the first stage's tokens; a
    3 x 3 convolution of stride 2, with no bias, and a norm those of each further stage. They
    overlap, so there are no positions. The head reads the mean of the last stage's tokens,
    normalised.

    Presets: `nat`, `biformer`, `soft_tiny`. Batch norms of published models are layer norms here,
    whose results do not depend on the rest of a batch.

    Raises:
      ValueError: a size is not positive, or a choice is unknown.
      TypeError: a size is not an integer.
    """

    stages: tuple[StageConfig, ...] = (StageConfig(), StageConfig(features=128, num_heads=4))
    """The stages, from fine to coarse."""
    image_size: int = 32
    """Height and width of the images."""
    channels: int = 3
    """Channels of the images."""
    num_classes: int = 10
    """Number of classes."""
    stem_layers: int = 2
    """Convolutions of the stem, each of which halves the image; all but the last have half of the
    first stage's width."""
    stem_activation: bool = False
    """Whether there is a gelu between convolutions of the stem."""
    implementation: Implementation | None = None
    """Implementation of the mechanisms; None: the best one for the platform."""
    norm: VisionNormKind = "layer"
    """Kind of all norms."""
    post_norm: bool = False
    """Whether blocks normalise what they add to, x = norm(x + f(x)), not what they read."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the computation; parameters, norms, scores, states and logits are float32 anyway."""
    remat: bool = False
    """Whether the backward pass computes every block again from its input."""

    def __post_init__(self) -> None:
        """Checks what does not depend on the mechanisms."""
        check_literals(self)
        check_positive(
            image_size=self.image_size,
            channels=self.channels,
            num_classes=self.num_classes,
            stem_layers=self.stem_layers,
            stages=len(self.stages),
        )

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Height and width of every stage's tokens; an odd side is halved upwards."""
        sides = [self.image_size]
        for _ in range(self.stem_layers + len(self.stages) - 1):
            sides.append(math.ceil(sides[-1] / 2))
        return tuple((side, side) for side in sides[self.stem_layers :])

    @property
    def num_tokens(self) -> int:
        """Tokens of an image in the first stage."""
        return math.prod(self.grids[0])

    @property
    def num_heads(self) -> int:
        """Largest number of devices that can share the heads of every stage."""
        return math.gcd(*(stage.num_heads for stage in self.stages))

    @property
    def mixers(self) -> tuple[str, ...]:
        """The mechanism of every layer."""
        return tuple(stage.mechanism for stage in self.stages for _ in range(stage.depth))

    @property
    def compute_dtype(self) -> Dtype:
        """Dtype of the computation."""
        return jnp.dtype(self.dtype)


def agent_deit(**overrides: Any) -> ViTConfig:
    """Agent-DeiT-T: 12 layers of agent attention, with a depthwise convolution of values.

    49 agents, means of 7 x 7 parts of the grid's queries, and biases of agents and tokens.

    Source: Han et al., Agent Attention: On the Integration of Softmax and Linear Attention (2023).

    Args:
      **overrides: fields of the configuration that differ.
    """
    fields = {
        "image_size": 224,
        "channels": 3,
        "num_classes": 1000,
        "patch_size": 16,
        "features": 192,
        "num_layers": 12,
        "num_heads": 3,
        "mechanism": "agent_attention",
        "value_convolution": 3,
        "agent_biases": True,
    }
    return ViTConfig(**(fields | overrides))


def nat(window: int = 7, **overrides: Any) -> PyramidConfig:
    """NAT-Mini: neighbourhood attention in stages of 3, 4, 6 and 5 blocks.

    Its relative position biases are left out, as in the fused kernels of its authors.

    Source: Hassani et al., Neighborhood Attention Transformer (2022).

    Args:
      window: W, at most the side of the last stage's grid: a 32nd of the image.
      **overrides: fields of the configuration that differ.
    """
    stages = _stages(
        (3, 4, 6, 5),
        (64, 128, 256, 512),
        mechanism=["neighborhood_attention"] * 4,
        options=[{"window": window}] * 4,
        hidden=3,
    )
    return PyramidConfig(**({"stages": stages, **_IMAGENET} | overrides))


def biformer(
    regions: int = 7, top_k: tuple[int, int, int] = (1, 4, 16), **overrides: Any
) -> PyramidConfig:
    """BiFormer-T: bi-level routing attention in three stages, full attention in the last.

    Values go through a depthwise 5 x 5 convolution besides, in the released model's last stage the
    layer's input; blocks begin with a depthwise 3 x 3 convolution that stands for positions. Scores
    are divided by the root of a head's channels, in the released model of all channels.

    Source: Zhu et al., BiFormer: Vision Transformer with Bi-Level Routing Attention (2023).

    Args:
      regions: S, parts of each side of the grid.
      top_k: number of regions that a region attends to, by stage.
      **overrides: fields of the configuration that differ.
    """
    routed = [{"regions": regions, "top_k": k} for k in top_k]
    stages = _stages(
        (2, 2, 8, 2),
        (64, 128, 256, 512),
        heads=(2, 4, 8, 8),
        mechanism=["bi_level_routing_attention"] * 3 + ["softmax_attention"],
        options=[*routed, {}],
        hidden=3,
        value_convolution=[5] * 4,
        position_convolution=[3] * 4,
    )
    return PyramidConfig(**({"stages": stages, "stem_activation": True, **_IMAGENET} | overrides))


def soft_tiny(**overrides: Any) -> PyramidConfig:
    """SOFT-Tiny: softmax-free attention in three stages, softmax attention in the last.

    Each of the three has 49 landmarks. The depthwise convolution of values has a filter for each
    channel, in the released model for each head, and the last stage pools by the mean, there by a
    class token.

    Source: Lu et al., SOFT: Softmax-free Transformer with Linear Complexity (2021).

    Args:
      **overrides: fields of the configuration that differ.
    """
    stages = _stages(
        (1, 2, 3, 2),
        (64, 128, 320, 512),
        heads=(2, 4, 10, 16),
        mechanism=["soft_attention"] * 3 + ["softmax_attention"],
        hidden=4,
        value_convolution=[9, 5, 3, None],
        landmark_stride=[8, 4, 2, None],
    )
    return PyramidConfig(**({"stages": stages, "post_norm": True, **_IMAGENET} | overrides))


_IMAGENET = {"image_size": 224, "channels": 3, "num_classes": 1000}


def _stages(
    depths: tuple[int, ...],
    widths: tuple[int, ...],
    *,
    hidden: int,
    heads: tuple[int, ...] | None = None,
    **fields: list[Any],
) -> tuple[StageConfig, ...]:
    """Returns stages from a value for each; heads have 32 channels unless they are given."""
    heads = tuple(width // 32 for width in widths) if heads is None else heads
    return tuple(
        StageConfig(
            depth=depth,
            features=width,
            num_heads=heads[i],
            hidden_features=hidden * width,
            **{name: values[i] for name, values in fields.items()},
        )
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True))
    )


def parameter_count(config: ViTConfig | PyramidConfig) -> int:
    """Number of parameters of a model, by the formula of docs/models.md."""
    norm = config.norm
    if isinstance(config, ViTConfig):
        d = config.features
        begin = d * (config.patch_size**2 * config.channels + 1)
        begin += d if config.pooling == "class" else 0
        begin += d * config.num_tokens if config.positions == "learned" else 0
        blocks = config.stage.parameter_count(norm, config.grid, config.pooling == "class")
    else:
        widths = [stage.features for stage in config.stages]
        d = widths[-1]
        stem = stem_widths(config)
        begin = sum(b * (9 * a + 1) for a, b in itertools.pairwise(stem))
        begin += sum(9 * a * b for a, b in itertools.pairwise(widths))
        begin += sum(_norm_size(norm, width) for width in widths)
        stages = zip(config.stages, config.grids, strict=True)
        blocks = sum(stage.parameter_count(norm, grid) for stage, grid in stages)
    return begin + blocks + _norm_size(norm, d) + (d + 1) * config.num_classes


def _norm_size(norm: VisionNormKind, features: int) -> int:
    return {"layer": 2, "rms": 1, "srms": 0}[norm] * features


def stem_widths(config: PyramidConfig) -> list[int]:
    """Channels before, between and after the convolutions of a pyramid's stem."""
    width = config.stages[0].features
    return [config.channels, *[width // 2] * (config.stem_layers - 1), width]
