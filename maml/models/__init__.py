"""Models, and the bridge from Flax NNX modules to pure functions."""

from maml.models.conv import Conv4 as Conv4
from maml.models.functional import functional as functional
from maml.models.layers import activations as activations
from maml.models.layers import blocks as blocks
from maml.models.mlp import MLP as MLP
from maml.models.policy import GaussianPolicy as GaussianPolicy
from maml.models.quantized import quantize as quantize
from maml.models.quantized import quantized as quantized
from maml.models.transformer import Transformer as Transformer
