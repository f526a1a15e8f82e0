"""The layers of a module, found by running it: their outputs, their order, and the parameters that go with each."""

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from maml.models.functional import hook, pure
from maml.types import Params

LAYERS = (nnx.Linear, nnx.Conv)

Outputs = OrderedDict[str, Any]
"""By path of the layer ("convs/0"). An OrderedDict: of a plain dict JAX would sort the keys."""


def activations(model: nnx.Module) -> Callable[[Params, Any], Outputs]:
    """f(params, inputs [batch, ...]) -> {layer: its outputs [batch, ...]} in order of execution, pure like `functional`'s apply.

    Layers are all `nnx.Linear` and `nnx.Conv`, wherever they are, and their outputs what they return: before norm and activation
    function. Batch norm is that of `functional`, so that f takes `Conditioned` too. Further calls of a layer are named "path:2",
    and so on; a layer that is never called, or whose kernel the model multiplies itself, has no output. Layers cannot be inside
    of an nnx transformation (`nnx.scan`).

    Raises:
      ValueError: as `functional`.
    """

    def call(model, inputs):
        outputs: Outputs = OrderedDict()

        def heard(path, layer, output):
            del layer
            calls = sum(name.partition(":")[0] == path for name in outputs)
            outputs[f"{path}:{calls + 1}" if calls else path] = output

        _listen(model, lambda module: isinstance(module, LAYERS), heard)
        model(inputs)
        return outputs

    return pure(model, call)[0]


def blocks(model: nnx.Module, inputs: Any) -> dict[str, tuple[str, ...]]:
    """Layers in order of execution, each with the paths of what holds its parameters: {layer: (layer, norm, ...)}.

    With a layer go the modules with parameters that run after it and before the next (norms); what runs before the first layer
    goes with the first. `inputs` [batch, ...] may be a `jax.ShapeDtypeStruct`: nothing is computed.

    Raises:
      ValueError: for a model that calls no layer, and as `functional`.
    """
    ran: dict[str, bool] = {}  # whether it is a layer

    def call(model, inputs):
        _listen(model, _holds_parameters, lambda path, module, _: ran.setdefault(path, isinstance(module, LAYERS)))
        return model(inputs)

    f, params = pure(model, call)
    jax.eval_shape(f, params, inputs)
    layers = [path for path, is_layer in ran.items() if is_layer]
    if not layers:
        raise ValueError(f"model: {type(model).__name__} calls no nnx.Linear or nnx.Conv; give one that does")
    inside = tuple(f"{path}/" for path in layers)
    found, at = {path: [path] for path in layers}, layers[0]
    for path, is_layer in ran.items():
        if is_layer:
            at = path
        elif not path.startswith(inside):
            found[at].append(path)
    return {layer: tuple(paths) for layer, paths in found.items()}


def _holds_parameters(module: nnx.Module) -> bool:
    return any(isinstance(value, nnx.Param) for value in vars(module).values())


def _listen(model: nnx.Module, which: Callable, heard: Callable[[str, nnx.Module, Any], Any]) -> None:
    """From now on heard(path, module, output) is called after each call of the modules that are meant.

    The module is changed, to a subclass of its own class: give one that nobody else has.
    """
    for path, module in list(nnx.iter_modules(model)):
        if which(module):
            hook(module, functools.partial(_hearing, functools.partial(heard, "/".join(map(str, path)), module)))


def _hearing(heard: Callable, own: Callable, *args, **kwargs):
    output = own(*args, **kwargs)
    heard(output)
    return output
