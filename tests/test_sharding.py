"""Tasks over several devices: what one device computes."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from experiments import run
from maml import train
from maml.implicit import implicit
from maml.inner_loop import learned_step_sizes, low_rank, only, per_step, unroll
from maml.losses import mse
from maml.models import MLP, functional
from maml.objectives import query_loss
from maml.random import key_for
from maml.tasks import sinusoid
from maml.types import initial
from tests.programs import ROOT, SMALL, config, summary

pytestmark = pytest.mark.usefixtures("compiled_once")

SCRIPT = """
import json, sys
from pathlib import Path
from experiments import plan
from maml.sharding import tasks_mesh
from tests.programs import SMALL, config, main, summary
from tests.test_sharding import after_steps

found = {}
for norm, chunk, devices in ((False, "auto", "all"), (True, 2, 2)):
    one, many = after_steps(1, norm, chunk), after_steps(devices, norm, chunk)
    size = max(abs(x).max() for x in one[0])
    found[f"{norm}/{devices}"] = float(max(abs(x - y).max() for x, y in zip(one[0], many[0])) / size)
    found[f"{norm}/{devices}/loss"] = abs(one[1] - many[1]) / one[1]
ended = main(*SMALL, "trainer.devices=4", "logger=quiet", f"hydra.run.dir={sys.argv[1]}/4")
loss = ended.err or summary(Path(sys.argv[1]) / "4")["metrics"]["meta_test/step_2/loss"]["mean"]
refused = main(*SMALL, "trainer.devices=3", f"hydra.run.dir={sys.argv[1]}/3")
chunks = {c.chunk for c in plan.candidates(config(*SMALL, "trainer.devices=2"), 2)}
print(json.dumps([found, loss, refused.err, sorted(chunks), tasks_mesh("all").size]))
"""


LOOPS = {
    "learned": lambda: learned_step_sizes(2, 0.05),
    "implicit": lambda: implicit(unroll(optax.sgd(0.05), 4), strength=2.0, cg_steps=3),
    "low_rank": lambda: low_rank(2, unroll(optax.sgd(0.05), 2)),
    "per_step": lambda: per_step(
        nnx.PathContains("norms"), 2, only(nnx.PathContains("head"), unroll(optax.sgd(0.05), 2))
    ),
}


def after_steps(devices, norm, chunk, loop="learned"):
    """Parameters, those of the loop, and loss after three outer steps of SGD on eight tasks, in float64."""
    with jax.enable_x64(True):
        apply, params = functional(MLP((1,), 1, hidden=(8,), norm=nnx.BatchNorm if norm else None, rngs=nnx.Rngs(0)))
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        adapt = LOOPS[loop]()
        objective, optimizer, root = query_loss(mse(apply), adapt), optax.sgd(0.1), jax.random.key(0)
        step = train.meta_step(objective, optimizer, meta_batch=8, task_chunk=chunk, devices=devices)
        state = train.init(initial(adapt, params, key_for(root, "inner")), optimizer, root)
        sampler, losses = sinusoid(shots=4, queries=4), {}
        progress = train.begin(state, step, sampler)
        progress = train.fit(progress, step, sampler, steps=3, log_every=3, log=losses.__setitem__)
        return [jax.device_get(x) for x in jax.tree.leaves(progress.state.params)], losses[3]["objective"]


def on_four_devices(script, *arguments):
    """What a script prints last."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_meta_gradient_over_devices_is_that_of_one(tmp_path):
    found, loss, refused, chunks, devices = on_four_devices(SCRIPT, tmp_path)
    assert devices == 4
    assert len(found) == 4
    assert {name: error for name, error in found.items() if not error <= 1e-9} == {}
    run.run(config(*SMALL, "logger=quiet"), tmp_path / "1")
    assert loss == pytest.approx(summary(tmp_path / "1")["metrics"]["meta_test/step_2/loss"]["mean"], rel=1e-5)
    assert "meta_batch=4, devices=3: give a multiple of the 3 devices" in refused
    assert chunks == [1, 2]  # of four tasks each device has two


OTHERS = """
import json
from tests.test_sharding import LOOPS, after_steps

found = {}
for loop in sorted(set(LOOPS) - {"learned"}):
    one, many = (after_steps(devices, True, "auto", loop) for devices in (1, "all"))
    size = max(abs(x).max() for x in one[0])
    found[loop] = float(max(abs(x - y).max() for x, y in zip(one[0], many[0], strict=True)) / size)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_other_inner_loops_over_devices_are_those_of_one():
    found = on_four_devices(OTHERS)
    assert len(found) == 3
    assert max(found.values()) <= 1e-9


def test_devices_that_are_not_there_are_refused():
    for devices in (2, 0, "some", True):
        with pytest.raises(ValueError, match=r"devices=.*there are 1 of kind cpu; give 1 to that, or all"):
            train.meta_step(lambda *_: None, optax.sgd(0.1), meta_batch=2, devices=devices)
