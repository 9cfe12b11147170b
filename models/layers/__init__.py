"""Layers: attention with any mechanism of the catalogue, normalisation, feed-forward."""

from models.layers.attention import AttentionLayer
from models.layers.feed_forward import FeedForward
from models.layers.norm import RMSNorm, SRMSNorm

__all__ = ["AttentionLayer", "FeedForward", "RMSNorm", "SRMSNorm"]
