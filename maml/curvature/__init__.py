"""Curvature: Hessians, their products and spectra, of any scalar function of a pytree of parameters.

Everything takes a function f(params) -> scalar, or the product of a symmetric matrix with a vector, `matvec(v) -> v`, and works
inside `jit`, under `vmap` over tasks, and of functions that hold an inner loop (the meta-objective) as of plain losses. Dense
matrices are for small networks; the rest needs products alone. The curvature of an inner loop is in `adaptation`.
"""

from maml.curvature.adaptation import (
    Comparison,
    Path,
    StableStep,
    adaptation_path,
    first_order_comparison,
    largest_update_singular_values,
    spectra,
    stable_step_size,
    update_singular_values,
)
from maml.curvature.landscape import Sharpness, filter_normalised, sharpness, slice_1d, slice_2d
from maml.curvature.matrices import LabelledMatrix, hessian, paths, restricted
from maml.curvature.products import efvp, ggnvp, hvp, matvec_over_batches, of_loss, over_batches
from maml.curvature.spectra import Density, Estimate, Spectrum, diagonal, lanczos, spectral_density, trace

__all__ = [
    "Comparison", "Density", "Estimate", "LabelledMatrix", "Path", "Sharpness", "Spectrum", "StableStep", "adaptation_path",
    "diagonal", "efvp", "filter_normalised", "first_order_comparison", "ggnvp", "hessian", "hvp", "lanczos",
    "largest_update_singular_values", "matvec_over_batches", "of_loss", "over_batches", "paths", "restricted", "sharpness",
    "slice_1d", "slice_2d", "spectra", "spectral_density", "stable_step_size", "trace", "update_singular_values",
]  # fmt: skip
