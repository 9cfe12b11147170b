"""Attention from one sequence to another, in which the mechanism is a name of the catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from attention import catalogue
from models.checks import check_inputs
from models.layers.attention import AttentionLayer, accepts

_BOTH = frozenset({"cross causal", "cross non-causal"})


class CrossAttentionLayer(AttentionLayer):
    """As `AttentionLayer`, with keys and values of another sequence, all of which is seen.

    There are no positions. A mechanism that has no cross form but fits keys and values to the
    queries' tokens (auto-correlation) does so.

    Args:
      features: D, channels of both inputs and of the output.
      num_heads: N, query heads.
      mechanism: slug of a mechanism of the catalogue.
      options: keyword arguments for the mechanism.
      rngs: the initialisers draw from its `params` stream.
      **settings: further arguments of `AttentionLayer`, but for `is_causal` and those of positions.

    Raises:
      ValueError, TypeError: as `AttentionLayer`, or the mechanism cannot attend to other tokens.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        mechanism: str = "softmax_attention",
        options: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
        **settings: Any,
    ):
        for name in ("is_causal", "positions", "rope_base"):
            if name in settings:
                raise ValueError(f"{name}: {settings[name]!r}, but cross-attention has none")
        record = catalogue.get(mechanism)
        if "cross non-causal" not in record.patterns:
            if not accepts(record.function, "fit"):
                raise ValueError(
                    f"mechanism: {mechanism!r} does not attend to another sequence; it supports "
                    f"{', '.join(sorted(record.patterns))}"
                )
            options = {"fit": True, **(options or {})}
        super().__init__(
            features,
            num_heads,
            mechanism=mechanism,
            options=options,
            is_causal=False,
            rngs=rngs,
            **settings,
        )

    def __call__(
        self, x: Float[Array, "B T D"], memory: Float[Array, "B S D"]
    ) -> Float[Array, "B T D"]:
        """Attends from each token of `x` to all of `memory`.

        Raises:
          ValueError: a shape does not fit.
        """
        check_inputs(x, self.features)
        if memory.ndim != 3 or memory.shape[::2] != (x.shape[0], self.features):
            raise ValueError(
                f"memory: shape {memory.shape} must be [{x.shape[0]}, tokens, {self.features}]"
            )
        keywords = self._keywords
        if self._record.patterns >= _BOTH:
            keywords["is_causal"] = False
        query = self.heads(x)[0]
        key, value = self.heads(memory)[1:]
        return self._project_out(x, self._record.function(query, key, value, **keywords))
