"""The mask algebra of `pallas_kernels.masks`, which says what each mask means."""

from pallas_kernels.masks import (
    Mask,
    blocks,
    causal,
    dense,
    dilated,
    lengths,
    prefix,
    rule,
    segments,
    window,
)

__all__ = [
    "Mask",
    "blocks",
    "causal",
    "dense",
    "dilated",
    "lengths",
    "prefix",
    "rule",
    "segments",
    "window",
]
