"""Strict settings: rank promotion raises, warnings are errors (pyproject.toml), annotations are checked."""

import gc
import importlib.metadata
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "XLA_FLAGS" not in os.environ:  # XLA_FLAGS= pytest: everything compiled as users have it
    # Half the time of compilation, and that is the time of the tests.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones have one way to make code of fusions
        os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"  # the older way, quicker to compile too

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(20_000, 10, 10)  # tracing makes many objects: with Python's 700 the collector takes 4 % of the time


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def full_compiler():
    """For a test that runs something long."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()  # programs of the two compilers differ in the last bit


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """For modules that run programs: what is compiled again comes from a cache that all tests of a session share."""
    from tests.programs import compiling_once

    with compiling_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture
def own_image_cache(tmp_path, monkeypatch):
    """Decoded images of one test are not those of another."""
    from maml.tasks import images

    monkeypatch.setenv("MAML_CACHE", str(tmp_path / "cache"))
    images._tfds_images.cache_clear()


@pytest.fixture(scope="module")
def tfds():
    import tensorflow_datasets

    return tensorflow_datasets
