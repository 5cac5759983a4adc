"""Models: thin compositions of stages."""

from .convnet import ConvNet
from .gpt import GPT
from .mlp import MLP
from .transformer import TransformerBlock
from .vit import ViT

__all__ = ["GPT", "MLP", "ConvNet", "TransformerBlock", "ViT"]
