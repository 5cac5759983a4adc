"""Models: thin compositions of stages."""

from .convnet import ConvNet
from .mlp import MLP
from .transformer import TransformerBlock
from .vit import ViT

__all__ = ["MLP", "ConvNet", "TransformerBlock", "ViT"]
