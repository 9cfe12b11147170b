"""Mixers of tokens with weights of their own, which models take by name as they take mechanisms.

Each is a module made by `Mixer(features, *, ..., dtype, out_kernel_init, rngs)` with the methods of
`AttentionLayer`: the call on whole sequences, `init_state` and `step`.
"""

from __future__ import annotations

from types import MappingProxyType

from flax import nnx

from models.layers.base_conv import BaseConv
from models.layers.mamba import MambaBlock
from models.layers.rat import RATLayer
from models.layers.titans import TitansMAC, TitansMAG, TitansMAL
from models.layers.titans_memory import TitansMemory

MIXERS: MappingProxyType[str, type[nnx.Module]] = MappingProxyType(
    {
        "base_conv": BaseConv,
        "mamba": MambaBlock,
        "rat": RATLayer,
        "titans_memory": TitansMemory,
        "titans_mac": TitansMAC,
        "titans_mag": TitansMAG,
        "titans_mal": TitansMAL,
    }
)
