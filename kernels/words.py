"""The words that operations are chosen by. Nothing is imported here, so that a command line knows them without torch."""

ACTIVATIONS = ("identity", "tanh", "sigmoid", "relu", "gelu", "gelu-tanh", "silu")
LOSSES = ("bce", "cross-entropy", "mse")
LINKS = ("auto", "identity", "sigmoid", "softmax")
SOURCES = ("delayed-error", "delayed-loss", "target", "current-error", "current-error-sign", "none")
BACKENDS = ("auto", "torch", "triton")
MOMENTS = ("float32", "bfloat16", "int8")
