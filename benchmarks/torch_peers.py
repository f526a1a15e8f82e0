"""The peers: one outer step of MAML with torch.func, higher, torchopt and learn2learn, each as its own MAML example writes it.

    python -m benchmarks.torch_peers

is a worker of `benchmarks.compare`: it reads one JSON request a line on stdin and answers one JSON line on stdout. It may run in
an environment of its own, with torch and the peers and without JAX.

Every peer is a class with `accumulate()`: it adds the meta-gradient of the mean over tasks to `.grad` of `net`'s parameters.
"""

import importlib.metadata
import json
import os
import sys
import time
import traceback

import numpy as np
import torch
from torch import Tensor

from benchmarks.torch_network import Network, examples, from_torch, loss_of, targets, to_torch

LEARNING_RATE = 1e-3
"""Of the outer Adam."""


class Peer:
    """A network, its tasks (tuples of support inputs, support targets, query inputs, query targets) and an outer Adam."""

    def __init__(self, spec, arrays):
        self.spec, self.loss = spec, loss_of(spec)
        self.steps, self.step_size, self.second = spec["steps"], spec["step_size"], spec["order"] == "second"
        self.weights = {k.removeprefix("params:"): x for k, x in arrays.items() if k.startswith("params:")}
        self.net = Network(spec, self.weights)  # in float32 or float64, as the arrays are
        data = [
            f(spec, arrays[f"{side}:{name}"])
            for side in ("support", "query")
            for f, name in ((examples, "inputs"), (targets, "targets"))
        ]
        self.batch, self.tasks = data, list(zip(*(x.unbind() for x in data), strict=True))
        self.begin()

    def begin(self) -> None:
        """Back to the first parameters, with a new Adam."""
        self.net.load_state_dict(to_torch(self.spec, self.weights))
        self.optimizer = torch.optim.Adam(self.net.parameters(), LEARNING_RATE)
        self.set_up()

    def set_up(self) -> None:
        """What a peer prepares before the loop over outer steps."""

    def accumulate(self) -> None:
        raise NotImplementedError

    def gradient(self) -> dict[str, np.ndarray]:
        """The first meta-gradient, in the library's names and layout."""
        self.begin()
        self.accumulate()
        return from_torch(self.spec, {k: p.grad for k, p in self.net.named_parameters()}, self.weights)

    def run(self, steps: int) -> float:
        """Seconds per outer step, Adam included, from the first parameters on."""
        self.begin()
        start = time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.accumulate()
            self.optimizer.step()
        return (time.perf_counter() - start) / steps


class Func(Peer):
    """torch.func: functional_call and grad, vmap over tasks, one backward."""

    def set_up(self) -> None:
        self.body = {k: p for k, p in self.net.named_parameters() if k.startswith("body")}
        self.norms = {k: p for k, p in self.net.named_parameters() if k.startswith("norms")}

    def loss_at(self, body: dict[str, Tensor], norms: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return self.loss(torch.func.functional_call(self.net, body | norms, (x,)), y)

    def task_loss(self, body, norms, support_x, support_y, query_x, query_y) -> Tensor:
        return self.loss_at(self.adapt(body, norms, support_x, support_y), norms, query_x, query_y)

    def task_gradient(self, body, norms, support_x, support_y, query_x, query_y) -> tuple:
        """First order: the gradient of the query loss at the adapted parameters; nothing is differentiated twice."""
        adapted = self.adapt(body, norms, support_x, support_y)
        return torch.func.grad(self.loss_at, (0, 1))(adapted, norms, query_x, query_y)

    def adapt(self, body, norms, x, y) -> dict[str, Tensor]:
        for _ in range(self.steps):
            grads = torch.func.grad(self.loss_at)(body, norms, x, y)
            body = {k: p - self.step_size * grads[k] for k, p in body.items()}
        return body

    def accumulate(self) -> None:
        dims = None, None, 0, 0, 0, 0
        if self.second:
            torch.func.vmap(self.task_loss, dims)(self.body, self.norms, *self.batch).mean().backward()
            return
        with torch.no_grad():
            body, norms = torch.func.vmap(self.task_gradient, dims)(self.body, self.norms, *self.batch)
        for k, p in self.net.named_parameters():
            p.grad = (body | norms)[k].mean(0)


class Higher(Peer):
    """higher: a differentiable copy and optimizer per task, one backward per task.

    First order without `track_higher_grads`: the gradient of the query loss at the adapted parameters is the meta-gradient.
    """

    def set_up(self) -> None:
        self.inner = torch.optim.SGD(self.net.body.parameters(), self.step_size)

    def accumulate(self) -> None:
        import higher

        for support_x, support_y, query_x, query_y in self.tasks:
            with higher.innerloop_ctx(
                self.net, self.inner, copy_initial_weights=False, track_higher_grads=self.second
            ) as (net, inner):
                for _ in range(self.steps):
                    inner.step(self.loss(net(support_x), support_y))
                loss = self.loss(net(query_x), query_y) / len(self.tasks)
                if self.second:
                    loss.backward()
                else:
                    _add(self.net.parameters(), torch.autograd.grad(loss, list(net.parameters())))


class TorchOpt(Peer):
    """torchopt: MetaSGD moves the network in place, whose state is extracted once and recovered after each task.

    MetaSGD always builds the graph of the inner gradient: first order is by the functional optimizer of the same library.
    """

    def set_up(self) -> None:
        import torchopt

        self.inner, self.functional = torchopt.MetaSGD(self.net.body, self.step_size), torchopt.sgd(self.step_size)

    def accumulate(self) -> None:
        import torchopt

        body = torchopt.extract_state_dict(self.net.body, by="reference")
        inner = torchopt.extract_state_dict(self.inner, by="reference")
        for task in self.tasks:
            loss = self.second_order(*task) if self.second else self.first_order(*task)
            torchopt.recover_state_dict(self.net.body, body)
            torchopt.recover_state_dict(self.inner, inner)
            (loss / len(self.tasks)).backward()

    def second_order(self, support_x, support_y, query_x, query_y) -> Tensor:
        for _ in range(self.steps):
            self.inner.step(self.loss(self.net(support_x), support_y))
        return self.loss(self.net(query_x), query_y)

    def first_order(self, support_x, support_y, query_x, query_y) -> Tensor:
        import torchopt

        def loss(params: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
            named = dict(zip(names, params, strict=True))
            return self.loss(torch.func.functional_call(self.net.body, named, (x, self.net.norms)), y)

        names, params = zip(*self.net.body.named_parameters(), strict=True)
        state = self.functional.init(params)
        for _ in range(self.steps):
            grads = torch.autograd.grad(loss(params, support_x, support_y), params)
            updates, state = self.functional.update(grads, state, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return loss(params, query_x, query_y)


class Learn2Learn(Peer):
    """learn2learn: a clone per task that adapts itself, one backward per task. The norms are outside what MAML wraps."""

    def set_up(self) -> None:
        maml = _learn2learn().algorithms.MAML
        self.maml = maml(self.net.body, lr=self.step_size, first_order=not self.second)

    def accumulate(self) -> None:
        for support_x, support_y, query_x, query_y in self.tasks:
            learner = self.maml.clone()
            for _ in range(self.steps):
                learner.adapt(self.loss(learner(support_x, self.net.norms), support_y))
            (self.loss(learner(query_x, self.net.norms), query_y) / len(self.tasks)).backward()


PEERS = {"torch.func": Func, "higher": Higher, "torchopt": TorchOpt, "learn2learn": Learn2Learn}


def _add(parameters, grads) -> None:
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g if p.grad is None else p.grad + g


def _learn2learn():
    """learn2learn imports torchvision for its data sets alone.

    A torchvision that was built for another torch (the one on PyPI is for CUDA) does not import; it does once the two
    operators are declared that it asks for.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        _learn2learn.operators = operators  # they live as long as this
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    import learn2learn

    return learn2learn


def sgemm(size: int, repeats: int) -> float:
    """GFLOP/s of a float32 product of square matrices, the best of `repeats`."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2e-9 * size**3 / best


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name.partition(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class Worker:
    """The peers of the case at hand, and what `compare` can ask for."""

    def __init__(self) -> None:
        self.peers: dict[str, Peer] = {}

    def versions(self) -> dict:
        return {name: version(name) for name in ("torch", *PEERS)}

    def sgemm(self, size: int, repeats: int, threads: int) -> float:
        torch.set_num_threads(threads)
        return sgemm(size, repeats)

    def begin(self, peer: str, spec: dict, arrays: str, gradient: str) -> None:
        """Build `peer` for a case from the .npz `arrays`, and write its first meta-gradient to the .npz `gradient`."""
        with np.load(arrays) as file:
            self.peers[peer] = PEERS[peer](spec, dict(file))
        np.savez(gradient, **self.peers[peer].gradient())

    def run(self, peer: str, steps: int, threads: int) -> float:
        torch.set_num_threads(threads)
        return self.peers[peer].run(steps)

    def forget(self) -> None:
        self.peers.clear()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": getattr(worker, request.pop("do"))(**request)}
        except Exception as e:
            answer = {"error": f"{type(e).__name__}: {e}", "traceback": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
