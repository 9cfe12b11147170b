"""Layers: attention with any mechanism of the catalogue, Mamba, normalisation, feed-forward."""

from models.layers.attention import AttentionLayer
from models.layers.convolution import CausalDepthwiseConv
from models.layers.feed_forward import FeedForward
from models.layers.mamba import MambaBlock
from models.layers.norm import RMSNorm, SRMSNorm

__all__ = [
    "AttentionLayer",
    "CausalDepthwiseConv",
    "FeedForward",
    "MambaBlock",
    "RMSNorm",
    "SRMSNorm",
]
