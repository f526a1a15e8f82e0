"""The networks of `benchmarks.cases` in PyTorch, and the way of their parameters between the library's layout and torch's.

Imported by `benchmarks.torch_peers` alone, in a Python that need not have JAX.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Spec = Mapping[str, Any]
"""What `benchmarks.compare` says of a case: network, pool, head, loss, spatial, step_size, steps, order (`cases.Case`)."""


class Offset(nn.Module):
    """Batch norm by the statistics of the batch at hand (biased variance), with an offset and no scale."""

    def __init__(self, features: int, epsilon: float):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(features))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, bias=self.bias, training=True, eps=self.epsilon)


class Body(nn.Module):
    """All that the inner loop moves. The norms come from outside, since it leaves them alone."""

    def __init__(self, spec: Spec, shapes: list[tuple[int, ...]]):
        super().__init__()
        self.conv, self.pool, self.head = spec["network"] == "conv", spec["pool"], spec["head"]
        # JAX pads SAME at stride 2 by 1 at the end where the size is even, by 1 on both sides where it is odd.
        self.late = [self.pool == "stride" and size % 2 == 0 for size in spec["spatial"]]
        self.layers = nn.ModuleList(
            nn.Conv2d(shape[1], shape[0], 3, stride=2 if self.pool == "stride" else 1, padding=0 if self.late[i] else 1)
            if len(shape) == 4
            else nn.Linear(shape[1], shape[0])
            for i, shape in enumerate(shapes)
        )

    def forward(self, x: Tensor, norms: nn.ModuleList) -> Tensor:
        *hidden, last = self.layers  # no slice: it would build a module, which higher cannot
        for i, layer in enumerate(hidden):
            x = layer(F.pad(x, (0, 1, 0, 1)) if self.conv and self.late[i] else x)
            x = F.relu(norms[i](x) if len(norms) else x)
            x = F.max_pool2d(x, 2) if self.pool == "max" else x
        if self.conv:
            x = x.mean((2, 3)) if self.head == "mean" else x.flatten(1)
        return last(x)


class Network(nn.Module):
    def __init__(self, spec: Spec, weights: Mapping[str, np.ndarray]):
        super().__init__()
        arrays = to_torch(spec, weights)
        kernels = [arrays[f"body.layers.{i}.weight"] for i in range(sum(k.endswith("weight") for k in arrays))]
        self.body = Body(spec, [tuple(k.shape) for k in kernels])
        norms = [arrays[k] for k in sorted(arrays) if k.startswith("norms")]
        self.norms = nn.ModuleList(Offset(len(x), spec["epsilon"]) for x in norms)
        self.to(kernels[0].dtype).load_state_dict(arrays)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, self.norms)


def loss_of(spec: Spec):
    return F.mse_loss if spec["loss"] == "mse" else F.cross_entropy


def examples(spec: Spec, x: np.ndarray) -> Tensor:
    """Inputs [tasks, examples, ...] as the network takes them: images with the channels first, or flat."""
    x = torch.from_numpy(x)
    if spec["network"] == "conv":
        return x.permute(0, 1, 4, 2, 3).contiguous()
    return x.flatten(2)


def targets(spec: Spec, y: np.ndarray) -> Tensor:
    return torch.from_numpy(y) if spec["loss"] == "mse" else torch.from_numpy(y).long()


def to_torch(spec: Spec, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Names and layouts of the library to those of `Network`."""
    names = _names(arrays)
    return {names[k]: torch.from_numpy(np.ascontiguousarray(_kernel(spec, k, x))) for k, x in arrays.items()}


def from_torch(spec: Spec, tensors: Mapping[str, Tensor], like: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `to_torch`: `like` has the library's names and shapes."""
    names = _names(like)
    return {k: _kernel(spec, k, tensors[names[k]].detach().numpy(), x.shape) for k, x in like.items()}


def _names(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The library's names to torch's: convs/0/kernel -> body.layers.0.weight, norms/0/bias -> norms.0.bias."""
    count = sum(k.startswith(("convs/", "layers/")) and k.endswith("kernel") for k in arrays)

    def name(key: str) -> str:
        *path, leaf = key.split("/")
        if path[0] == "norms":
            return f"norms.{path[1]}.bias"
        index = count if path == ["head"] else path[1]
        return f"body.layers.{index}.{'weight' if leaf == 'kernel' else leaf}"

    return {key: name(key) for key in arrays}


def _kernel(spec: Spec, key: str, x: np.ndarray, back: tuple[int, ...] | None = None) -> np.ndarray:
    """A kernel in the other layout; `back` is the library's shape where torch's is given. What is no kernel stays.

    Convolutions are HWIO and OIHW, linear layers [in, out] and [out, in]. The head of a flattened image reads its features in
    the order height, width, channels in the library, and channels, height, width in torch.
    """
    if not key.endswith("kernel"):
        return x
    if x.ndim == 4:
        return x.transpose(3, 2, 0, 1) if back is None else x.transpose(2, 3, 1, 0)
    if key == "head/kernel" and spec["head"] == "flatten":
        n = spec["spatial"][-1]
        if back is None:
            return x.reshape(n, n, -1, x.shape[1]).transpose(3, 2, 0, 1).reshape(x.shape[1], -1)
        return x.reshape(back[1], -1, n, n).transpose(2, 3, 1, 0).reshape(back)
    return x.T
