"""The cases of the comparison: networks of `maml.models`, fixed data, and the operations that the algorithm takes.

Data are drawn once with NumPy, so that every side gets the same bits. Image networks have batch norm with an offset and no scale,
of the statistics of the batch at hand (biased variance, eps 1e-3); the inner loop leaves the offsets alone, the outer loop learns
them.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial

import jax
import numpy as np
from flax import nnx

from maml import models
from maml.types import Apply, Params, Task

EPSILON = 1e-3
"""Of batch norm."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One row group of the table.

    Attributes:
      name, title: a letter, and what it is in words.
      network: "mlp" (widths are the hidden layers) or "conv" (widths are the filters of the 3×3 convolutions).
      input_shape: of one example; images are (height, width, channels).
      pool, head: `pool` and `spatial` of `models.Conv4`; unused by an MLP.
      loss: "mse" or "cross_entropy".
      support, query: examples per task.
      tasks: per outer step.
      step_size: of the inner SGD.
    """

    name: str
    title: str
    network: str
    input_shape: tuple[int, ...]
    widths: tuple[int, ...]
    outputs: int
    loss: str
    support: int
    query: int
    tasks: int
    step_size: float
    norm: bool = True
    pool: str = ""
    head: str = ""

    def model(self) -> nnx.Module:
        kernel_init = nnx.initializers.glorot_uniform()
        norm = partial(nnx.BatchNorm, use_scale=False, epsilon=EPSILON) if self.norm else None
        if self.network == "mlp":
            return models.MLP(
                self.input_shape, self.outputs, hidden=self.widths, norm=norm, kernel_init=kernel_init, rngs=nnx.Rngs(0)
            )
        return models.Conv4(
            self.input_shape, self.outputs, filters=self.widths[0], pool=self.pool, spatial=self.head, norm=norm,
            kernel_init=kernel_init, rngs=nnx.Rngs(0),
        )  # fmt: skip

    def functional(self) -> tuple[Apply, Params]:
        """The library's forward function and parameters; biases and offsets are random, so that an error in one shows."""
        apply, params = models.functional(self.model())
        rng = np.random.default_rng(1)
        jitter = {
            name: x + rng.normal(0, 0.1, x.shape).astype(x.dtype) if x.ndim == 1 else x
            for name, x in flat(params).items()
        }
        return apply, unflat(jitter, params)

    def data(self) -> Task:
        """NumPy arrays [tasks, examples, ...], the same at every call."""
        rng = np.random.default_rng(0)
        if self.loss == "mse":
            amplitude, phase = rng.uniform(0.1, 5, (self.tasks, 1, 1)), rng.uniform(0, np.pi, (self.tasks, 1, 1))
            inputs = rng.uniform(-5, 5, (self.tasks, self.support + self.query, 1))
            targets = (amplitude * np.sin(inputs - phase)).astype(np.float32)
        else:
            # A picture of 7×7 patches per class, and noise: of pure noise all images have nearly the same features.
            side, channels = self.input_shape[0], self.input_shape[-1]
            patches = rng.uniform(0, 1, (self.tasks, self.outputs, 7, 7, channels))
            classes = np.kron(patches, np.ones((1, 1, side // 7, side // 7, 1)))
            targets = np.tile(np.arange(self.support + self.query, dtype=np.int32) % self.outputs, (self.tasks, 1))
            inputs = classes[:, targets[0]]
            inputs += rng.normal(0, 0.1, inputs.shape)
        pair, k = (inputs.astype(np.float32), targets), self.support
        return Task(tuple(x[:, :k] for x in pair), tuple(x[:, k:] for x in pair))

    def spatial(self) -> list[int]:
        """Height (equal to the width) of the images that go into each convolution, and of what goes to the head."""
        sizes = [self.input_shape[0]]
        for _ in self.widths:
            sizes.append(-(-sizes[-1] // 2) if self.pool == "stride" else sizes[-1] // 2)
        return sizes

    def products(self) -> list[int]:
        """Multiply-adds of the forward pass of each layer, for one example; taps on padding count, as is usual."""
        if self.network == "mlp":
            sizes = [math.prod(self.input_shape), *self.widths, self.outputs]
            return [n * m for n, m in zip(sizes[:-1], sizes[1:], strict=True)]
        size, channels = self.spatial(), [self.input_shape[-1], *self.widths]
        out = size[1:] if self.pool == "stride" else size[:-1]
        convs = [9 * n * n * a * b for n, a, b in zip(out, channels[:-1], channels[1:], strict=True)]
        features = channels[-1] * (size[-1] ** 2 if self.head == "flatten" else 1)
        return [*convs, features * self.outputs]

    def flops(self, steps: int, order: str) -> int:
        """Floating-point operations of one outer step: of the algorithm, whatever the compiled program does.

        Matrix products and convolutions alone are counted, a multiply-add as 2. Per example, F is the multiply-adds of the
        forward pass and f those of its first layer, whose inputs are data and take no derivative:

          gradient   3F - f    forward F, input gradients F - f, kernel gradients F
          its vector-Jacobian product, one Hessian-vector product, beyond the gradient itself
                     6F - 4f   each of these products has two factors, hence a tangent (or cotangent) of two products:
                               x ẇ and ẋ w: 2F - f;  ẏ wᵀ and y ẇᵀ: 2 (F - f);  xᵀ ẏ and ẋᵀ y: 2F - f
          query      3F - f    one gradient

        The count is the same for forward over reverse and reverse over reverse. In first order there is no Hessian-vector
        product. Nothing is counted for recomputation, norms, losses, activations or the outer optimizer.
        """
        forward, first = sum(self.products()), self.products()[0]
        gradient, hessian = 3 * forward - first, 6 * forward - 4 * first
        inner = gradient + (hessian if order == "second" else 0)
        return 2 * self.tasks * (steps * self.support * inner + self.query * gradient)


CASES = {
    case.name: case
    for case in (
        Case("A", "sinusoid MLP 2×40, 10 points", "mlp", (1,), (40, 40), 1, "mse", 10, 10, 25, 0.01, norm=False),
        Case(
            "B", "Omniglot Conv-4 64, strided, 5w1s", "conv", (28, 28, 1), (64,) * 4, 5, "cross_entropy", 5, 75, 32, 0.1,
            pool="stride", head="mean",
        ),
        Case("C", "Omniglot MLP, 5w1s", "mlp", (28, 28, 1), (256, 128, 64, 64), 5, "cross_entropy", 5, 75, 32, 0.1),
        Case(
            "D", "mini-ImageNet Conv-4 32, max-pool, 5w1s", "conv", (84, 84, 3), (32,) * 4, 5, "cross_entropy", 5, 75, 4, 0.1,
            pool="max", head="flatten",
        ),
    )
}  # fmt: skip


def flat(tree: Params) -> dict[str, np.ndarray]:
    """Path ("convs/0/kernel") -> array on the host: the form in which parameters and gradients go to peers and come back."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {_name(path): np.asarray(x) for path, x in leaves}


def unflat(arrays: Mapping[str, np.ndarray], like: Params) -> Params:
    """The inverse of `flat`, in the structure of `like`."""
    leaves, structure = jax.tree.flatten_with_path(like)
    return structure.unflatten([jax.numpy.asarray(arrays[_name(path)]) for path, _ in leaves])


def _name(path) -> str:
    """The dict keys of a key path; the attribute in which Flax keeps a variable's array is none."""
    return "/".join(str(k.key) for k in path if hasattr(k, "key"))
