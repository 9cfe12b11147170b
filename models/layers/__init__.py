"""Layers: attention with any mechanism of the catalogue, other mixers, norms, feed-forward."""

from models.layers.attention import AttentionLayer
from models.layers.base_conv import BaseConv
from models.layers.convolution import CausalDepthwiseConv
from models.layers.cross_attention import CrossAttentionLayer
from models.layers.feed_forward import FeedForward
from models.layers.mamba import MambaBlock
from models.layers.mixers import MIXERS
from models.layers.norm import LayerNorm, RMSNorm, SRMSNorm
from models.layers.rat import RATLayer
from models.layers.titans import TitansMAC, TitansMAG, TitansMAL
from models.layers.titans_memory import TitansMemory
from models.layers.vision_attention import GridAttentionLayer

__all__ = [
    "MIXERS",
    "AttentionLayer",
    "BaseConv",
    "CausalDepthwiseConv",
    "CrossAttentionLayer",
    "FeedForward",
    "GridAttentionLayer",
    "LayerNorm",
    "MambaBlock",
    "RATLayer",
    "RMSNorm",
    "SRMSNorm",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
    "TitansMemory",
]
