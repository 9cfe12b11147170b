"""Attention on more than one device.

Calls partition themselves over batch and heads; `axes` names the Auto mesh axes that shard them.
"""

from pallas_kernels.partition import axes

__all__ = ["axes"]
