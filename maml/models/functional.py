"""From a Flax NNX module to a pure function and its parameters."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from maml.types import Apply, Conditioned, Joint, Padded, Params


def functional(model: nnx.Module) -> tuple[Apply, Params]:
    """Split an NNX module into `apply(params, inputs) -> outputs` and its parameters, an `nnx.State` of `nnx.Param`.

    Batch norm is transductive where `params` are plain: the statistics are those of the inputs at hand, and no running
    average is kept. With `Conditioned(params, reference)` the statistics are those of a pass over the reference inputs, and
    every input is predicted in a batch of its own, so that a prediction cannot depend on the other inputs, not by a bit; with
    `Joint` in one batch with the reference inputs. Of `Padded` inputs batch norm takes those that are present.
    The module itself is left as it was. `apply.batch_statistics` says whether it holds batch norm, or another module that says so
    of itself (`batch_statistics`). Its method `features`, if any, is `apply.features(params, inputs)`: what its head sees.

    Raises:
      ValueError: for what is no NNX module; for one that holds random state (dropout; not a recurrent cell's, whose carry starts
        at the same numbers in every call): `apply` has no key to draw from; `apply` itself where a model calls a batch norm
        twice, for `Conditioned` parameters (inside of `nnx.remat` and other transformations, which make a norm anew for each
        call, that is not seen).
    """
    apply: Any
    apply, params = pure(model, lambda model, inputs: model(inputs))
    if callable(getattr(model, "features", None)):
        apply.features, _ = pure(model, lambda model, inputs: model.features(inputs))
    return apply, params


def pure(model: nnx.Module, call: Callable[[Any, Any], Any]) -> tuple[Apply, Params]:
    """`functional` of call(model, inputs) -> pytree of [batch, ...] in place of model(inputs). `call` may change the module.

    Raises:
      ValueError: as `functional`.
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"model: {type(model).__name__} is no NNX module; a Linen module serves by its own apply and init: "
            "loss = mse(module.apply), params = module.init(key, inputs)"
        )
    model = nnx.clone(model)
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.BatchNorm):
            module.momentum = 0.0  # a "running average" that is the last batch
            module.use_running_average = False
        if hasattr(module, "use_fast_variance"):
            # E[x²] - E[x]² cancels in float32, and is clipped by a `max` whose derivative is not safe (models.conv._max_pool).
            module.use_fast_variance = False
    recurrent = [path for path, m in nnx.iter_graph(model) if isinstance(m, nnx.RNN | nnx.RNNCellBase)]

    def drawn(path, _):  # what a recurrent cell keeps is for the start of its carry, zeros unless told otherwise
        return not any(path[: len(at) + 1] == (*at, "rngs") for at in recurrent)

    graphdef, params, random, rest = nnx.split(model, nnx.Param, nnx.All(nnx.RngState, drawn), ...)
    if jax.tree.leaves(random):
        raise ValueError(
            "the module holds random state (dropout?), and apply(params, inputs) has no key: build it without rngs for what is "
            "drawn at each call, or write a loss that hands its key to the module"
        )

    def apply(params, inputs):
        state = _fresh(rest, params)
        if not isinstance(params, Conditioned | Joint):
            return _on_present(call, nnx.merge(graphdef, params, state), inputs)
        model, reference = nnx.merge(graphdef, params.params, state), params.reference
        if isinstance(params, Conditioned):
            _on_present(lambda model, inputs: model(inputs), model, reference, once=True)
            model.set_attributes(nnx.BatchNorm, use_running_average=True, raise_if_not_found=False)
        settled, state = nnx.split(model)

        def alone(x):
            x = jax.tree.map(lambda leaf: leaf[None], x)
            if isinstance(params, Joint):
                x = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), reference, x)
            here = jax.tree.map(lambda s: s, state)  # variables of this trace: batch norm writes to them
            return jax.tree.map(lambda y: y[-1], _on_present(call, nnx.merge(settled, here), x))

        return lax.map(alone, inputs)

    apply.takes_conditioned = True
    parts = [module for _, module in nnx.iter_graph(model)]
    apply.batch_statistics = any(isinstance(x, nnx.BatchNorm) or getattr(x, "batch_statistics", False) for x in parts)
    return apply, params


def _on_present(call: Callable[[Any, Any], Any], model: nnx.Module, inputs: Any, *, once: bool = False) -> Any:
    """call(model, inputs), whose batch norm takes only the present ones of `Padded` inputs.

    once: every batch norm keeps the statistics of its inputs, with their derivatives (what Flax keeps has none); one that is
    called twice is refused, for it would keep those of its last call.
    """
    if not (once or isinstance(inputs, Padded)):
        return call(model, inputs)
    seen = []  # the norms themselves: an id alone may be that of a later object

    def around(own, x, *args, **kwargs):
        if any(norm is own.args[0] for norm in seen):
            raise ValueError(
                "this model calls a batch norm twice, and one set of support statistics cannot serve both calls: give each call "
                "a norm of its own, or take norm=batch or joint"
            )
        seen.extend(own.args if once else ())
        if isinstance(inputs, Padded):
            kwargs["mask"] = inputs.present.reshape(-1, *[1] * (x.ndim - 1))
        output = own(x, *args, **kwargs)
        if once:
            _keep_statistics(own.args[0], x, kwargs.get("mask"))
        return output

    norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.BatchNorm)]
    for norm in norms:
        hook(norm, around)
    result = call(model, inputs.inputs if isinstance(inputs, Padded) else inputs)
    for norm in norms:
        unhook(norm)
    return result


def _keep_statistics(norm: nnx.BatchNorm, x: Any, mask: Any) -> None:
    """Mean and variance over all axes but the features', in float32 or wider, as Flax computes them."""
    features = {axis % x.ndim for axis in (norm.axis if isinstance(norm.axis, Sequence) else (norm.axis,))}
    axes = tuple(axis for axis in range(x.ndim) if axis not in features)
    x = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
    mean = x.mean(axes, keepdims=True, where=mask)
    norm.mean[...] = mean.squeeze(axes)
    norm.var[...] = jnp.square(x - mean).mean(axes, where=mask)


def hook(module: nnx.Module, around: Callable) -> None:
    """From now on module(*args) is around(own, *args), where own(*args) is what it was. The module becomes one of a subclass."""
    if before := vars(module).get("_around"):
        vars(module)["_around"] = lambda own, *args, **kwargs: around(functools.partial(before, own), *args, **kwargs)
    else:
        vars(module)["_around"] = around
        object.__setattr__(module, "__class__", _hooked(type(module)))


def unhook(module: nnx.Module) -> None:
    """Undo every `hook` of the module."""
    del vars(module)["_around"]
    object.__setattr__(module, "__class__", type(module).__bases__[0])


@functools.cache
def _hooked(kind: type) -> type:
    """The class with hooked calls. One for each kind: NNX registers every class for good."""

    def call(self, *args, **kwargs):
        return vars(self)["_around"](functools.partial(kind.__call__, self), *args, **kwargs)

    return type(kind)(kind.__name__, (kind,), {"__call__": call})


def _fresh(state: Params, params: Params) -> Params:
    """A copy whose variables belong to the trace at hand, as wide as the parameters: batch norm writes to them."""
    width = jnp.result_type(*jax.tree.leaves(params))

    def copy(x):
        return x.astype(jnp.promote_types(x.dtype, width)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(copy, state)
