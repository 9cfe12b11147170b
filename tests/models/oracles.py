"""The models once more, in NumPy float64, one sequence and one pair of tokens at a time.

Written from the papers' equations and sharing nothing with the code under test. Parameters are
nested dictionaries under the names that the modules give them.
"""

import math

import numpy as np


def float64(tree):
    """A tree of parameters as NumPy float64, with the `kernel` level taken out."""
    if not isinstance(tree, dict):
        return np.asarray(tree, np.float64)
    if "kernel" in tree:
        assert set(tree) == {"kernel"}
        return float64(tree["kernel"])
    return {name: float64(value) for name, value in tree.items()}


def srms_norm(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def rms_norm(x, gain):
    return srms_norm(x) * gain


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def swiglu(x, p):
    return (silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def sglu(x, p):
    return ((x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def alibi_slopes(heads):
    """Press et al.: powers of 2^(-8/P); for other counts every second slope of twice as many."""
    power = 1
    while 2 * power <= heads:
        power *= 2
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    doubled = [2 ** (-8 * (h + 1) / (2 * power)) for h in range(2 * power)]
    return np.array(slopes + doubled[0::2][: heads - power])


def slopes(layer, layers, heads, decay):
    """TransNormerLLM's decay rates; "alibi" as its released models, "paper" as its paper."""
    if decay == "alibi":
        return alibi_slopes(heads) * (1 - layer / (layers - 1) + 1e-5)
    return np.array([8 * h / heads * (1 - layer / layers) for h in range(heads)])


def rope(x, base=10_000.0):
    """x [T, H]: channels i and i + H/2 are the parts of a complex number that is turned."""
    tokens, channels = x.shape
    half = channels // 2
    turned = np.empty_like(x)
    for t in range(tokens):
        for i in range(half):
            z = complex(x[t, i], x[t, i + half]) * np.exp(1j * t * base ** (-2 * i / channels))
            turned[t, i], turned[t, i + half] = z.real, z.imag
    return turned


def split_heads(x, head_dim):
    return [x[:, i : i + head_dim] for i in range(0, x.shape[1], head_dim)]


def gated_linear_attention(x, p, decay_rates, head_dim):
    """TransNormerLLM's GLA on x [T, D]; with LRPE where the parameters have `theta`."""
    queries = split_heads(silu(x @ p["query"]), head_dim)
    keys = split_heads(silu(x @ p["key"]), head_dim)
    values = split_heads(x @ p["value"], head_dim)
    group = len(queries) // len(keys)
    outputs = []
    for n, q in enumerate(queries):
        k, v = keys[n // group], values[n // group]
        o = np.zeros((len(x), head_dim))
        for t in range(len(x)):
            for j in range(t + 1):
                terms = q[t] * k[j]
                if "theta" in p:
                    terms = terms * np.cos((t - j) * p["theta"][n // group])
                o[t] += math.exp(-decay_rates[n] * (t - j)) * terms.sum() * v[j]
        outputs.append(o)
    o = srms_norm(np.concatenate(outputs, axis=1))
    return ((x @ p["gate"]) * o) @ p["out"]


def softmax_attention(x, p, head_dim, causal=True):
    """Multi-head attention with RoPE on x [T, D]; grouped heads where there are fewer keys."""
    queries = [rope(q) for q in split_heads(x @ p["query"], head_dim)]
    keys = [rope(k) for k in split_heads(x @ p["key"], head_dim)]
    values = split_heads(x @ p["value"], head_dim)
    group = len(queries) // len(keys)
    outputs = []
    for n, q in enumerate(queries):
        k, v = keys[n // group], values[n // group]
        o = np.zeros((len(x), head_dim))
        for t in range(len(x)):
            seen = range(t + 1 if causal else len(x))
            weights = np.array([math.exp(q[t] @ k[j] / math.sqrt(head_dim)) for j in seen])
            o[t] = sum(w * v[j] for w, j in zip(weights / weights.sum(), seen, strict=True))
        outputs.append(o)
    return np.concatenate(outputs, axis=1) @ p["out"]


def transnormer_llm(tokens, p, heads, decay):
    """Logits of TransNormerLLM for tokens [T]."""
    width = p["embed"]["embedding"].shape[1]
    layers = len(p["layers"])
    x = p["embed"]["embedding"][tokens] * math.sqrt(width)
    for layer in range(layers):
        block = p["layers"][layer]
        rates = slopes(layer, layers, heads, decay)
        x = x + gated_linear_attention(srms_norm(x), block["attention"], rates, width // heads)
        x = x + sglu(srms_norm(x), block["feed_forward"])
    return srms_norm(x) @ p["head"]


def transformer(tokens, p, head_dim):
    """Logits of the pre-norm transformer for tokens [T]."""
    x = p["embed"]["embedding"][tokens]
    for layer in range(len(p["layers"])):
        block = p["layers"][layer]
        normed = rms_norm(x, block["attention_norm"]["scale"])
        x = x + softmax_attention(normed, block["attention"], head_dim)
        normed = rms_norm(x, block["feed_forward_norm"]["scale"])
        x = x + swiglu(normed, block["feed_forward"])
    return rms_norm(x, p["final_norm"]["scale"]) @ p["head"]
