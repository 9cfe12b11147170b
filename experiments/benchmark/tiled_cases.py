"""What the schedules of tiled attention are compared on: ours, JAX's and tokamax's kernels."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as jax_splash
from jaxtyping import Array

from experiments.benchmark.measure import directed
from experiments.compile_report import Case, Work
from pallas_kernels import masks
from pallas_kernels.tiled import IMPLEMENTATIONS, tiled_attention

TOKENS, HEADS, FEATURES = 4096, 8, 128
BOUND = 30.0
"""Of the logits, where the softmax is told one; the schedule does not depend on its value."""
FORWARD = Work(products=2, features=FEATURES)
# On v6e its products fill more of the matrix units than they are counted with, see docs/kernels.md.
BACKWARD = Work(products=5, features=FEATURES, scores=1024 * 1024)
WEIGHTS = {
    "softmax": {},
    "softmax, bounded": {"logits_bound": BOUND},
    "sigmoid": {"weights": "sigmoid"},
}
# Queries and keys of a block, and keys of a step within it: of those that were tried, the best for
# either TPU, and the square ones, which are the usual choice. JAX's others do best with the tokens
# of a key in lanes.
JAX_FORWARD = ((512, 512, 512), (1024, 1024, 1024), (2048, 1024, 256), (1024, 2048, 512))
JAX_BACKWARD = ((512, 512, 512), (1024, 1024, 1024))
TOKAMAX_FORWARD = ((1024, 1024, 1024), (1024, 1024, 512), (2048, 1024, 256), (1024, 2048, 512))
TOKAMAX_BACKWARD = ((512, 512, 512), (1024, 1024, 1024))

Attention = Callable[..., Array]
Blocks = tuple[int, int, int]


def cases() -> dict[str, Case | str]:
    """Returns the cases, ours first, and in place of those that cannot be made the reason."""
    return {
        f"{direction}, {mask}, {name}": case
        for direction in ("forward", "backward")
        for mask in ("causal", "full")
        for kernels in (_ours, _jax, _tokamax)
        for name, case in kernels(direction, mask == "causal").items()
    }


def our_case(direction: str, **options: Any) -> Case | str:
    """Returns the case of our TPU kernel with options of `tiled_attention`."""
    if "pallas_tpu" not in IMPLEMENTATIONS:
        return "not available"
    attention = functools.partial(tiled_attention, implementation="pallas_tpu", **options)
    works = {"forward": {"tiled_forward": FORWARD}, "backward": {"tiled_backward": BACKWARD}}
    return _case(direction, attention, (1, TOKENS, HEADS, FEATURES), works[direction])


def _ours(direction: str, causal: bool) -> dict[str, Case | str]:
    mask = masks.causal() if causal else None
    return {
        f"ours {name}": our_case(direction, mask=mask, **options)
        for name, options in WEIGHTS.items()
    }


def _jax(direction: str, causal: bool) -> dict[str, Case | str]:
    found = {}
    for block_q, block_k, step in JAX_FORWARD if direction == "forward" else JAX_BACKWARD:
        # Built when it is called: it holds arrays.
        def attention(*arrays: Array, sizes: Blocks = (block_q, block_k, step)) -> Array:
            mask = (jax_splash.CausalMask if causal else jax_splash.FullMask)((TOKENS, TOKENS))
            layouts = jax_splash.QKVLayout
            square = sizes[0] == sizes[1]
            blocks = jax_splash.BlockSizes(
                *sizes,
                *sizes,
                *sizes[:2],
                k_layout=layouts.HEAD_DIM_MINOR if square else layouts.SEQ_MINOR,
            )
            kernel = jax_splash.make_splash_mha(
                jax_splash.MultiHeadMask([mask] * HEADS),
                block_sizes=blocks,
                head_shards=1,
                q_seq_shards=1,
            )
            return kernel(*arrays)

        scores = block_q * block_k
        works = {
            "forward": {"splash_mha_fwd_no_residuals": Work(2, FEATURES, scores)},
            "backward": {
                "splash_mha_dkv_no_residuals": Work(4, FEATURES, scores),
                "splash_mha_dq_no_residuals": Work(3, FEATURES, scores),
            },
        }
        name = f"JAX splash {block_q} x {block_k} by {step}"
        found[name] = _case(direction, attention, (HEADS, TOKENS, FEATURES), works[direction])
    return found


def _tokamax(direction: str, causal: bool) -> dict[str, Case | str]:
    if importlib.util.find_spec("tokamax") is None:
        return {"tokamax splash": "not available: python -m pip install -e '.[peers]'"}
    forward = direction == "forward"
    found = {}
    for (block_q, block_k, step), bound in itertools.product(
        TOKAMAX_FORWARD if forward else TOKAMAX_BACKWARD, (None, BOUND) if forward else (None,)
    ):

        def attention(
            *arrays: Array, sizes: Blocks = (block_q, block_k, step), bound: float | None = bound
        ) -> Array:
            # Its public interface does not take block sizes.
            from tokamax._src.ops.experimental.tpu.splash_attention import (
                splash_attention_kernel as splash,
            )
            from tokamax._src.ops.experimental.tpu.splash_attention import (
                splash_attention_mask as splash_masks,
            )

            mask = (splash_masks.CausalMask if causal else splash_masks.FullMask)((TOKENS, TOKENS))
            config = splash.SplashConfig(*sizes, *sizes, max_logit_const=bound)
            return splash.make_splash_mha(mask, config=config, q_seq_shards=1)(*arrays)

        scores = block_q * block_k
        works = {
            "forward": {"splash_mha_fwd_no_residuals": Work(2, FEATURES, scores)},
            "backward": {"splash_mha_dkv_no_residuals": Work(5, FEATURES, scores)},
        }
        name = (
            f"tokamax splash{'' if bound is None else ' bounded'} {block_q} x {block_k} by {step}"
        )
        found[name] = _case(direction, attention, (HEADS, TOKENS, FEATURES), works[direction])
    return found


def _case(
    direction: str, attention: Attention, shape: tuple[int, ...], kernels: dict[str, Work]
) -> Case:
    function = directed(direction, attention, range(3))
    return Case(function, (jax.ShapeDtypeStruct(shape, jnp.bfloat16),) * 3, kernels)
