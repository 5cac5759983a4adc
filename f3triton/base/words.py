"""The words and defaults that options take, of all rooms but the kernels (see `kernels.words`).

They are here and not where they are used so that `train.py --help` knows them without importing torch.
"""

from ..kernels.words import SOURCES

PRECISIONS = ("float32", "float64", "tf32", "bfloat16", "float16", "bfloat16-weights")

# data
CLASSIFICATION, REGRESSION, LANGUAGE_MODELING = "classification", "regression", "language-modeling"
AUGMENTATIONS = ("none", "shift", "crop-flip")
BUFFER, STATISTICS = 10_000, 10_000  # rows of a stream that are mixed; that statistics are taken from

# network, models
OPTIMIZERS = ("sgd", "adam", "adamw")
LAWS = (
    "kaiming",
    "trinomial",
    "binomial",
    "discrete-uniform",
    "identity-repeat-pm",
    "identity-repeat",
    "identity-fill-zero",
    "kaiming-repeat-line",
    "constant",
    "alternate-negative",
    "chunked-negative",
    "cartesian-product",
)
# Learning rates of adam and adamw where none is given, by method: from bench.rates and, for networks that are no MLPs,
# bench.local. Of the methods that were not measured, the last.
RATES = {"f3": 3e-3, "local": 1e-3, "dfa": 1e-3, "bp": 1e-3, "others": 5e-4}
FEEDBACK_SHAPES = ("full", "shared", "generated", "shared-generated")
FEEDBACK_AT = ("output", "normalised")
KINDS = ("mlp", "vit", "convnet", "gpt")
TRANSFORMER_NORMS = ("layer", "rms", "none")
GRANULARITIES = ("block", "layer")
EMBEDDINGS = ("joint", "patch")
POOLS = ("flatten", "mean")
LAYERS = 1000  # at most: each is made before anything is known of its weights
# The options that each kind of network has beside `activation`, and their values where they are not given.
_TRANSFORMER = {"depth": 4, "heads": 8, "dim": 32, "head_dim": None, "mlp_width": 128, "dropout": 0.0, "granularity": "block"}
_GPT = {"heads": 4, "dim": 128, "mlp_width": None, "tied": False, "feedback_shape": "shared", "feedback_at": "normalised"}
_VIT = {"patch_size": 7, "embedding": "joint", "position_embedding": False, "pool": "flatten", "norm": "layer"}
OPTIONS: dict[str, dict[str, object]] = {
    "mlp": {"hidden": [500, 500], "feedback_shape": "full", "norm": None, "residual": False},
    "vit": {**_TRANSFORMER, **_VIT, "feedback_shape": "full"},
    "gpt": {**_TRANSFORMER, **_GPT},
    "convnet": {"channels": [32], "kernel_size": 5, "hidden": [1000], "feedback_shape": "full", "norm": "none"},
}

# learn, visits, error store
METHODS = ("f3", "drtp", "dfa", "sdfa", "local", "fa", "bp", "last-layer")
SIGNALS = (*SOURCES, "local-error")
ORDERS = ("one", "turns")
SAMPLINGS = ("uniform", "error")
FIRST_VISITS = ("skip", "target", "stale")
DEFAULT_VISITS = 5
AUTO_BATCHES = 10  # a window's size in batches, for `auto`
FLOATS = ("float64", "float32", "float16", "bfloat16")
ERROR_DTYPES = (*FLOATS, "int8", "ternary")

# distributed
BY = ("auto", "factors", "gradients")
PIPELINE_LINKS = ("host", "nccl")

# run
TOKENS, TEMPERATURE = 300, 0.8  # of a sample of text, where nothing else is asked for
LOGS = ("tensorboard",)
WHICH = ("best", "last")  # models of a run
