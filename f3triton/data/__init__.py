"""Data sets as tensors: each row decoded once, with a stable index, and the preprocessing kept beside it.

`load_dataset` reads what the Hugging Face library reads (and `"digits"`, which comes with this package) and gives two
`Dataset`s, train and test, that share one `Preprocessing`. Importing this package imports neither `datasets` nor `pandas`.
"""

from .dataset import Dataset
from .load import load_dataset
from .preprocessing import Preprocessing
from .streams import StreamDataset, stream_dataset
from .text import TextDataset, load_text

__all__ = ["Dataset", "Preprocessing", "StreamDataset", "TextDataset", "load_dataset", "load_text", "stream_dataset"]
