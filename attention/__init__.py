"""Attention mechanisms as pure JAX functions: `attention.<slug>(query, key, value, ...)`.

Every mechanism of the catalogue is importable from here by its slug, and with it `<slug>_step` and
`init_<slug>_state` where it has a recurrent form, and `init_<slug>` where it has weights.
`python -m attention` prints the catalogue. Beside them stand the merge of attention to disjoint
sets of keys, and the transposed application of attention's weights.
"""

from attention import catalogue, masks, parallel, positions
from attention.catalogue import mechanisms as _mechanisms
from pallas_kernels.tiled import merge_partials, tiled_attention_transposed

for _record in _mechanisms().values():
    globals().update(_record.exports)

__all__ = [
    "catalogue",
    "masks",
    "merge_partials",
    "parallel",
    "positions",
    "tiled_attention_transposed",
]
__all__ += [_name for _record in _mechanisms().values() for _name in _record.exports]
