"""Our TPU kernels of tiled attention with one feature at a time, for the time they take to compile.

Peers compile beside them.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from experiments.benchmark import tiled_cases
from experiments.benchmark.tiled_cases import HEADS, TOKENS, WEIGHTS, our_case
from experiments.compile_report import Case
from pallas_kernels import masks

SLOPES = np.linspace(0.1, 1, HEADS, dtype=np.float32)


def _lists(block: int, kept: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns lists of the first blocks for every head and block of queries, and their counts."""
    count = np.full((1, HEADS, TOKENS // block), kept, np.int32)
    return np.broadcast_to(np.arange(kept, dtype=np.int32), (*count.shape, kept)), count


def cases() -> dict[str, Case | str]:
    """Returns the cases of every feature, forward and backward, and those of peers."""
    documents = np.arange(TOKENS)[None] // 1000
    features = {
        **{name: {"mask": masks.causal(), **options} for name, options in WEIGHTS.items()},
        "no mask": {},
        "window": {"mask": masks.causal() & masks.window(1023, 0)},
        "segments": {"mask": masks.causal() & masks.segments(documents, documents)},
        "soft cap": {"mask": masks.causal(), "logits_soft_cap": 30.0},
        "ALiBi": {"mask": masks.causal(), "alibi_slopes": SLOPES},
        "sink": {"mask": masks.causal(), "sink": SLOPES},
        "bias": {"bias": np.zeros((1, 1, TOKENS, TOKENS), jnp.bfloat16)},
        "softplus": {"mask": masks.causal(), "weights": "softplus"},
        "softplus, reweighted": {
            "mask": masks.causal(),
            "weights": "softplus",
            "row_statistic": SLOPES,
            "reweight": (3.0, 1.0),
        },
        "groups of 64": {"mask": masks.causal(), "group_size": 64},
        "relative bias": {"relative_bias": np.zeros((HEADS, 257), np.float32)},
        "block list": {"mask": masks.causal() & masks.blocks(*_lists(64, 16), 64, 64)},
        "block list of 16 tokens": {"mask": masks.blocks(*_lists(16, 32), 16, 16)},
    }
    found = {
        f"{direction}, {name}": our_case(direction, **options)
        for direction in ("forward", "backward")
        for name, options in features.items()
    }
    return found | {
        name: case
        for name, case in tiled_cases.cases().items()
        if "causal" in name and (name.endswith("1024 x 1024 by 1024") or isinstance(case, str))
        if ", ours " not in name
    }
