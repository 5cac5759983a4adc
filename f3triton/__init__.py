"""F3: neural networks trained with no backward pass (arXiv 2304.13372)."""

__version__ = "0.1.0"
