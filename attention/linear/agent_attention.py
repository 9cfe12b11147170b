"""Agent attention: a few agents gather from all keys, and tokens read from the agents."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from attention.catalogue import Mechanism
from attention.grid import checked_shape, pooled, sizes_by_axis
from pallas_kernels.checks import check_arrays
from pallas_kernels.tiled import tiled_attention

NUM_AGENTS = 49
"""Of the released DeiT: 7 x 7."""


def agent_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B S K H"],
    value: Float[ArrayLike, "B S K V"],
    *,
    shape: tuple[int, ...] | None = None,
    num_agents: int | tuple[int, ...] | None = None,
    agents: Float[ArrayLike, "B n N H"] | None = None,
    agent_bias: Float[ArrayLike, "N n S"] | None = None,
    query_bias: Float[ArrayLike, "N T n"] | None = None,
    scale: float | None = None,
    query_scale: float | None = None,
    prefix_tokens: int = 0,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Softmax attention of n agents to all tokens, and of all tokens to the agents.

    With agents a_m, means of the queries over parts of the sequence or image, for every head

        u_m = sum_j softmax_j(scale a_m . k_j + agent_bias_mj) v_j
        o_i = sum_m softmax_m(query_scale q_i . a_m + query_bias_im) u_m

    so it is linear attention: the matrix of all tokens is the product of one of T x n and one of
    n x S, of rank n at most, and its rows sum to 1. O(T n) time, O(T) memory.

    Part i of n of an axis of L tokens has those from floor(i L / n) to before ceil((i + 1) L / n),
    so there may be more agents than tokens. Not causal, and packed documents are not taken: agents
    are of a whole row. The published layers add a depthwise 3 x 3 convolution of the values of an
    image, and the training-free one for diffusion a multiple of the values: both are sums with the
    output, and left to layers. For the latter, `agents` are queries that were merged, and
    `query_scale` is H ** -0.15.

    Scores and sums are float32, or float64 for float64 queries. First derivatives exist in reverse
    mode; the implementation "reference" has all.

    Source: Han et al., Agent Attention: On the Integration of Softmax and Linear Attention (2023).

    Args:
      query: float array.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads.
      value: likewise.
      shape: of the tokens that are pooled, such as (height, width); None for a sequence.
      num_agents: number of agents on each axis of the shape; None for 49 of a sequence, 7 x 7 of an
        image, 4 x 4 x 4 of a video.
      agents: agents to use in place of pooled queries.
      agent_bias: B1, added to scores of agents and keys; broadcasts to [B, N, n, S].
        `agent_biases` makes it.
      query_bias: B2, added to scores of queries and agents; broadcasts to [B, N, T, n].
      scale: factor of the scores; None for 1 / sqrt(H).
      query_scale: that of scores of queries and agents; None for the same.
      prefix_tokens: how many first tokens, such as a class token, are not pooled, nor in the shape.
      implementation: None for the best, "reference", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      The output in query's dtype.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 1 + 14 * 14, 4, 8))
      >>> out = agent_attention(query, key, value, shape=(14, 14), prefix_tokens=1)
      >>> out.shape
      (2, 197, 4, 8)
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value)
    batch, tokens, heads, features = query.shape
    if agents is None:
        agents = _pooled(query, shape, num_agents, prefix_tokens)
    elif shape is not None or num_agents is not None or prefix_tokens:
        raise ValueError("agents: are given, so there is no shape, num_agents nor prefix_tokens")
    agents = jnp.asarray(agents)
    wanted = batch, heads, features
    if agents.ndim != 4 or (agents.shape[0], *agents.shape[2:]) != wanted or not agents.shape[1]:
        raise ValueError(
            f"agents: must be [{batch}, n, {heads}, {features}]; got shape {agents.shape}"
        )
    agents = agents.astype(query.dtype)
    sizes = batch, heads, agents.shape[1]
    agent_bias = _checked("agent_bias", agent_bias, (*sizes, key.shape[1]))
    query_bias = _checked("query_bias", query_bias, (*sizes[:2], tokens, sizes[2]))

    scale = features**-0.5 if scale is None else scale
    options = {"implementation": implementation, "function": "agent_attention"}
    gathered = tiled_attention(agents, key, value, bias=agent_bias, scale=scale, **options)
    query_scale = scale if query_scale is None else query_scale
    return tiled_attention(query, agents, gathered, bias=query_bias, scale=query_scale, **options)


def _pooled(
    query: Float[Array, "B T N H"],
    shape: tuple[int, ...] | None,
    num_agents: int | tuple[int, ...] | None,
    prefix_tokens: int,
) -> Float[Array, "B n N H"]:
    tokens = query.shape[1]
    if not isinstance(prefix_tokens, int) or not 0 <= prefix_tokens < tokens:
        raise ValueError(
            f"prefix_tokens: must be an integer from 0 to {tokens - 1}; got {prefix_tokens!r}"
        )
    shape = checked_shape(shape, tokens - prefix_tokens)
    if num_agents is None:
        num_agents = round(NUM_AGENTS ** (1 / len(shape)))
    return pooled(query[:, prefix_tokens:], shape, sizes_by_axis("num_agents", num_agents, shape))


def _checked(name: str, bias: ArrayLike | None, shape: tuple[int, ...]) -> Array | None:
    if bias is None:
        return None
    bias = jnp.asarray(bias)
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise TypeError(f"{name}: must be floating point; got {bias.dtype}")
    aligned = zip(reversed(bias.shape), reversed(shape), strict=False)
    if bias.ndim > 4 or any(a not in (1, b) for a, b in aligned):
        raise ValueError(f"{name}: shape {bias.shape} does not broadcast to {shape}")
    return bias


def agent_biases(
    table: Float[ArrayLike, "N n a b"],
    rows: Float[ArrayLike, "N n h"],
    columns: Float[ArrayLike, "N n w"],
    prefix: Float[ArrayLike, "N n p"] | None = None,
    *,
    shape: tuple[int, int],
) -> Float[Array, "N n p+height*width"]:
    """Returns the bias of agents and the tokens of an image, for `agent_attention`.

    It is the table, read between its entries for every place of the image, plus the value of the
    place's row and that of its column. Swapped, [N, T, n], it is a bias of queries and agents; the
    two have parameters of their own.

    Source: as for `agent_attention`. There a table is 7 x 7, and rows and columns are as many as
    the image's: others are read between their entries here too.

    Args:
      table: of places in an image of any size: [.., a, b] lie evenly over it, half a step from its
        edges.
      rows: of each row.
      columns: of each column.
      prefix: of the tokens before those of the image, such as a class token.
      shape: height and width of the image.

    Returns:
      The sum, in the dtype of the table.

    Raises:
      ValueError: shapes do not fit.

    Example:
      >>> table, rows, columns = (jnp.ones((4, 49, *size)) for size in ((7, 7), (14,), (9,)))
      >>> agent_biases(table, rows, columns, shape=(14, 9)).shape
      (4, 49, 126)
    """
    table, rows, columns = (jnp.asarray(x) for x in (table, rows, columns))
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        raise ValueError(f"shape: must be (height, width); got {shape!r}")
    if table.ndim != 4:
        raise ValueError(f"table: must be [N, n, a, b]; got shape {table.shape}")
    lead = table.shape[:2]
    for name, x in (("rows", rows), ("columns", columns), ("prefix", prefix)):
        if x is not None and (jnp.ndim(x) != 3 or jnp.shape(x)[:2] != lead):
            raise ValueError(f"{name}: must start with {lead}, as table; got shape {jnp.shape(x)}")

    def resized(x: Array, *size: int) -> Array:
        return jax.image.resize(x, (*lead, *size), "linear", antialias=False)

    height, width = shape
    sums = resized(table, height, width)
    sums += resized(rows, height)[..., None] + resized(columns, width)[:, :, None]
    sums = sums.astype(table.dtype).reshape(*lead, height * width)
    if prefix is None:
        return sums
    return jnp.concatenate([jnp.asarray(prefix, table.dtype), sums], axis=2)


RECORD = Mechanism(
    slug="agent_attention",
    title="Agent Attention: On the Integration of Softmax and Linear Attention",
    year=2023,
    family="linear",
    patterns=frozenset({"self non-causal", "cross non-causal"}),
    time="O(T)",
    memory="O(T)",
    kernel="tiled",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    function=agent_attention,
    extras=(agent_biases,),
    small={"num_agents": 5},
)
