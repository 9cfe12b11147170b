"""Which implementation of a kernel family serves a call.

A name is resolved when the call is traced. That is too early for the best one: a program traced on
a CPU may be compiled for TPU, or exported for both. So `at_lowering` puts the choice off until the
program is lowered, when the platform and the number of devices are known.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_gpu")

Supports = Callable[..., str | None]
"""`supports(**call)` of an implementation: None if it serves the call, or the reason why not."""


def resolve_implementation(
    implementation: str | None, available: Mapping[str, Supports], *, function: str, **call: object
) -> str:
    """Returns the name of the implementation that is to serve a call.

    Args:
      implementation: the caller's wish; None for the best that supports the call.
      available: the family's implementations, best first, each with its `supports`.
      function: name of the public function, for messages.
      **call: what `supports` looks at.

    Raises:
      ValueError: there is no implementation of this name.
      NotImplementedError: the named implementation does not exist in this family, or does not
        support the call; the message says why.
    """
    if implementation is None:
        reasons = {}
        for name, supports in available.items():
            reason = supports(**call)
            if reason is None:
                return name
            reasons[name] = reason
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NotImplementedError(f"{function}: no implementation supports this call: {listed}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{function}: implementation must be None or one of {', '.join(IMPLEMENTATIONS)}; "
            f"got {implementation!r}"
        )
    if implementation not in available:
        reason = f"it has none; it has {', '.join(available)}"
    else:
        reason = available[implementation](**call)
    if reason is not None:
        raise NotImplementedError(
            f"{function}: implementation {implementation!r} does not serve this call: {reason}"
        )
    return implementation


def implemented(
    name: str,
    modules: Mapping[str, Any],
    kernels: Mapping[str, str],
    implementation: str | None,
    *static: Any,
    function: str,
    **call: object,
) -> Callable[..., Any]:
    """Returns the function of this name of the implementation that serves a call.

    Args:
      name: of the function, such as "forward", in every module.
      modules: the family's implementations, "xla" among them, each with its `supports`, and maybe
        `unproved`: None, or the reason why only who asks for it by name gets it.
      kernels: the implementation that is the best on a platform, by platform.
      implementation: the caller's wish; None for a choice by what the call is lowered for.
      *static: first arguments of the function.
      function: name of the public function, for messages.
      **call: what `supports` looks at.

    Raises:
      NotImplementedError: the named implementation does not support the call.
    """

    def bound(module: str) -> Callable[..., Any]:
        return functools.partial(getattr(modules[module], name), *static)

    if implementation is not None:
        available = {name: module.supports for name, module in modules.items()}
        return bound(resolve_implementation(implementation, available, function=function, **call))

    def serves(module: str) -> bool:
        tests = modules[module].supports, getattr(modules[module], "unproved", None)
        return all(test is None or test(**call) is None for test in tests)

    serving = {platform: bound(module) for platform, module in kernels.items() if serves(module)}
    return functools.partial(at_lowering, bound("xla"), serving)


_PLATFORMS = ("tpu", "cuda")

_Flat = Callable[..., list[jax.Array]]  # a kernel, from leaves to leaves


def at_lowering(
    fallback: Callable[..., Any], kernels: Mapping[str, Callable[..., Any]], *args: Any
) -> Any:
    """Calls the kernel for the platform that the program is lowered for, or else the fallback.

    A kernel is called where it can run: on one device, or inside of a shard_map that is manual over
    the whole mesh. Elsewhere XLA partitions the fallback. A kernel is traced when the program is
    lowered for its platform, and never otherwise. It is not differentiable: it is what derivative
    rules are made of.

    Args:
      fallback: plain JAX, for any platform and any number of devices. It closes over no tracers.
      kernels: by platform, "tpu" or "cuda", functions with the arguments and results of the
        fallback. They close over no tracers either.
      *args: pytrees of arrays.

    Returns:
      The results, a pytree of arrays with the types of the fallback's.

    Raises:
      ValueError: there is no such platform.
      TypeError: when the program is lowered: the results of a kernel differ from the fallback's in
        structure, shape or dtype.
      NotImplementedError: the call is differentiated.
    """
    unknown = sorted(set(kernels) - set(_PLATFORMS))
    if unknown:
        raise ValueError(f"kernels: platforms must be of {', '.join(_PLATFORMS)}; got {unknown}")
    leaves, tree = jax.tree.flatten(args)
    jaxpr, types = jax.make_jaxpr(fallback, return_shape=True)(*args)
    flat = {
        platform: functools.partial(_flat, platform, kernel, tree, types)
        for platform, kernel in kernels.items()
    }
    return jax.tree.structure(types).unflatten(_choice.bind(*leaves, fallback=jaxpr, **flat))


def _flat(
    platform: str,
    kernel: Callable[..., Any],
    tree: jax.tree_util.PyTreeDef,
    types: Any,
    *leaves: jax.Array,
) -> list[jax.Array]:
    """Calls a kernel with leaves and returns leaves, of the types of the fallback's."""

    def described(results: Any) -> Any:
        return jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", results)

    results = kernel(*tree.unflatten(leaves))
    got, wanted = described(results), described(types)
    if jax.tree.flatten(got) != jax.tree.flatten(wanted):
        raise TypeError(f"kernels: {platform!r} must return {wanted}, as the fallback; got {got}")
    return jax.tree.leaves(results)


# A primitive of our own: `jax.lax.platform_dependent` traces the kernels of all platforms, also on
# a machine where they cannot be traced, and does not know how many devices there are.
_choice = core.Primitive("kernel_choice")
_choice.multiple_results = True


@_choice.def_effectful_abstract_eval
def _types(*_: Any, fallback: core.ClosedJaxpr, **kernels: _Flat) -> tuple[Sequence[Any], Any]:
    del kernels
    return fallback.out_avals, fallback.effects


@_choice.def_impl
def _run(*args: jax.Array, **params: Any) -> list[jax.Array]:
    with jax.disable_jit(False):  # else this would be called again
        return jax.jit(functools.partial(_choice.bind, **params))(*args)


def _batched(
    args: Sequence[Any],
    dims: Sequence[int | None],
    *,
    fallback: core.ClosedJaxpr,
    **kernels: _Flat,
) -> tuple[list[jax.Array], list[int]]:
    vmap = functools.partial(jax.vmap, in_axes=tuple(dims))
    fallback = jax.make_jaxpr(vmap(core.jaxpr_as_fun(fallback)))(*args)
    kernels = {platform: vmap(kernel) for platform, kernel in kernels.items()}
    results = _choice.bind(*args, fallback=fallback, **kernels)
    return results, [0] * len(results)


def _differentiated(*_: Any, **__: Any) -> None:
    raise NotImplementedError(
        "at_lowering: a choice of kernels is not differentiable; derivative rules are made around "
        "it, by jax.custom_vjp"
    )


def _lowered(
    ctx: mlir.LoweringRuleContext,
    *args: Any,
    fallback: core.ClosedJaxpr,
    platform: str | None = None,
    **kernels: _Flat,
) -> Sequence[Any]:
    function = core.jaxpr_as_fun(fallback)
    if platform in kernels and _is_local(ctx):
        function = kernels[platform]
    return mlir.lower_fun(function)(ctx, *args)


def _is_local(ctx: mlir.LoweringRuleContext) -> bool:
    """Returns whether what is lowered works on the arrays of one device."""
    kinds = jax.sharding.get_abstract_mesh().axis_types
    if kinds and all(kind == AxisType.Manual for kind in kinds):
        return True
    # Nothing documented knows the number of devices. This is where Pallas's own rules look it up.
    context = ctx.module_context.axis_context
    return isinstance(context, mlir.ShardingContext) and context.num_devices == 1


batching.primitive_batchers[_choice] = _batched
ad.primitive_jvps[_choice] = _differentiated
mlir.register_lowering(_choice, _lowered)
for _platform in _PLATFORMS:
    mlir.register_lowering(_choice, functools.partial(_lowered, platform=_platform), _platform)
