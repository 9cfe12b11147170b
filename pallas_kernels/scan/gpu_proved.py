"""The parts of a call of a scan: its dtypes, its sizes and its terms."""

from pallas_kernels import gpu
from pallas_kernels.gpu_proved import Proved
from pallas_kernels.scan import gpu_gated, gpu_selective, gpu_softmax
from pallas_kernels.scan.inputs import Inputs, Options, Selective, Softmax


def parts_of(*, options: Options, inputs: Inputs) -> frozenset[str]:
    """Names the parts of a call, each with its scan."""
    kernels = {"gated": gpu_gated, "selective": gpu_selective, "softmax": gpu_softmax}
    tiling = kernels[options.scan].cut(options, inputs, whole=True)
    named = {f"{name} in {x.dtype.name}" for name, x in inputs.tokens._asdict().items()}
    terms = {
        "segments": inputs.begins is not None,
        "tokens behind the last": tiling.tokens != inputs.out.shape[1],
    }
    if options.scan == "gated":
        terms["chunks side by side"] = gpu_gated.in_chunks(tiling)
    if isinstance(inputs.tokens, Selective):
        features = gpu.whole(inputs.state.hidden.shape[1], gpu_selective.FEATURES)
        named.add(f"states of {features}")
        terms |= {
            "groups": inputs.tokens.b.shape[2] > 1,
            "skip": inputs.parameters.skip is not None,
            "bias": inputs.parameters.bias is not None,
            "softplus": options.softplus,
        }
    if isinstance(inputs.tokens, Softmax):
        terms["shared values"] = inputs.tokens.score.shape[2] != inputs.tokens.value.shape[2]
    named |= {f"tiles of {tiling.rows}"} | {name for name, there in terms.items() if there}
    return frozenset(f"{options.scan}: {name}" for name in named)


PROVED = Proved(__package__, parts_of)
