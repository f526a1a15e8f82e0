"""Quantizers with straight-through derivatives that are right at every order, what they did, and integers to leave with.

A quantizer is a function of an array: its value is on the grid exactly, its derivative that of a surrogate (`straight_through`).
"""

from maml.quantization.diagnostics import clipped_fraction as clipped_fraction
from maml.quantization.diagnostics import code_flips as code_flips
from maml.quantization.diagnostics import code_metrics as code_metrics
from maml.quantization.diagnostics import encoded as encoded
from maml.quantization.diagnostics import sqnr as sqnr
from maml.quantization.diagnostics import with_code_metrics as with_code_metrics
from maml.quantization.grids import binary as binary
from maml.quantization.grids import ternary as ternary
from maml.quantization.grids import uniform as uniform
from maml.quantization.integers import export as export
from maml.quantization.integers import integer_conv as integer_conv
from maml.quantization.integers import integer_matmul as integer_matmul
from maml.quantization.learned import learned as learned
from maml.quantization.learned import lsq as lsq
from maml.quantization.learned import lsq_gradient_scale as lsq_gradient_scale
from maml.quantization.learned import lsq_range as lsq_range
from maml.quantization.named import input_quantizer as input_quantizer
from maml.quantization.named import kernel_quantizer as kernel_quantizer
from maml.quantization.quantizer import Codes as Codes
from maml.quantization.quantizer import Quantizer as Quantizer
from maml.quantization.quantizer import decode as decode
from maml.quantization.quantizer import straight_through as straight_through
from maml.quantization.storage import on_grid as on_grid
