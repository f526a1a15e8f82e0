"""The algorithms as the configuration has them."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

import experiments.build  # noqa: F401  registers the schema
from maml.losses import cross_entropy
from maml.models import functional

ROOT = Path(__file__).parents[1]
ALGORITHMS = sorted(path.stem for path in (ROOT / "conf/algorithm").glob("*.yaml"))


@pytest.mark.parametrize("model", ["mlp_batch_norm", "conv4"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_offsets_of_batch_norm_are_meta_learned_and_not_adapted(algorithm, model):
    """cbfinn/maml: the inner loop moves weights and biases alone; with `where` gone, or `norms` renamed, this fails."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [f"algorithm={algorithm}", f"model={model}", "algorithm.steps=2"])
    factory = instantiate(cfg.model, _convert_="all")
    apply, params = functional(factory((16, 16, 1), 3, rngs=nnx.Rngs(0)))
    images = jax.random.uniform(jax.random.key(1), (6, 16, 16, 1))
    adapt = instantiate(cfg.algorithm.adapt, _convert_="all")
    adapted = jax.jit(lambda p, x: adapt(cross_entropy(apply), p, (x, np.arange(6) % 3), jax.random.key(2)).params)
    result = adapted(params, images)
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/"): bool((before != after).any())
        for (path, before), after in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(result), strict=True)
    }
    assert any("norms" in path for path in moved)
    assert not any(changed for path, changed in moved.items() if "norms" in path)
    assert all(changed for path, changed in moved.items() if "kernel" in path)
