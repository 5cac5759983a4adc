"""A trained network as a plain module: raw rows in, predictions out."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from ..base.exceptions import InputError
from ..base.seeds import check_seed
from ..data import Preprocessing
from ..data.preprocessing import TENSORS, TEXT
from ..network.sequential import Sequential
from .folder import build_network, load_weights, model_file, read_config
from .hub import PREFIX, fetch

LARGEST_INPUT = 1 << 27  # numbers of a sample


class Predictor(nn.Module):
    """What a run learned, for use: `forward` takes raw inputs and gives predictions.

    Raw inputs are what the data set holds before any preparation: a tensor of images `[N, ...]` with values 0..255, a
    tensor of a table's columns `[N, columns]` if all are numbers, or rows (a list of dicts, a dict of columns, a data
    frame, a `datasets` data set; numbers and dates may be text, as `csv.DictReader` gives them, and images paths of
    files). `forward` gives probabilities `[N, classes]`, in the order of `classes`, or values `[N, targets]` in the targets'
    own units; `predict` gives class names or numbers.

    Probabilities sum to one. After training by `bce` they are the sigmoids divided by their sum: each estimates its class's
    probability by itself, so that of a well trained model the sum is about one already (a softmax would sharpen them). Where
    several classes may be true at once, take `torch.sigmoid` of the network's output instead.

    Of a language model, rows are texts of the same number of tokens; `forward` gives the probabilities of the next token after
    each token `[N, tokens, C]`, `predict` the likeliest token after each text, and `generate` continues one.
    """

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, loss: str, which: str = "last") -> None:
        super().__init__()
        self.network, self.preprocessing, self.loss, self.which = network, preprocessing, loss, which

    def extra_repr(self) -> str:
        return f"which={self.which!r}, loss={self.loss!r}"

    def forward(self, rows: object) -> Tensor:
        if torch.compiler.is_exporting():
            raise InputError(
                "a Predictor reads rows, which is no graph of tensors; export its network, which takes preprocessing.normalise("
                "preprocessing.encode(rows))"
            )
        like = next(self.network.parameters())
        names = [column.name for column in self.preprocessing.columns]
        if names and isinstance(rows, Tensor) and rows.ndim == 2 and rows.shape[1] == len(names):
            rows = {name: rows[:, i].tolist() for i, name in enumerate(names)}
        return self.from_inputs(self.preprocessing.encode(rows).to(like.device))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes (of a text: the tokens), in the order of the probabilities; none where numbers are predicted."""
        return () if self.loss == "mse" else self.preprocessing.target_names

    def from_inputs(self, inputs: Tensor) -> Tensor:
        """What `forward` gives, of encoded inputs `[N, K]` on the model's device."""
        a = self.network(self.preprocessing.normalise(inputs, next(self.network.parameters()).dtype))  # [N, C]
        if self.loss == "mse":
            return self.preprocessing.unstandardise(a)
        return torch.softmax(a if self.loss == "cross-entropy" else nn.functional.logsigmoid(a), -1)

    @torch.no_grad()
    def predict(self, rows: object) -> list:
        """Class names, or numbers (lists of numbers where there are several targets), one a row."""
        output = self(rows)
        return self.answers(output[:, -1] if self.preprocessing.kind == TEXT else output)

    def answers(self, output: Tensor) -> list:
        """What `predict` gives, of the output `[N, C]` of `forward`."""
        if classes := self.classes:
            return [classes[i] for i in output.argmax(-1).tolist()]
        return output.squeeze(-1).tolist() if output.shape[-1] == 1 else output.tolist()

    @torch.no_grad()
    def generate(self, prompt: str | None = None, tokens: int = 300, temperature: float = 1.0, seed: int = 0) -> str:
        """`prompt` and `tokens` more tokens, each drawn from the model's probabilities after the last `context` of them.

        `temperature` divides the logits; 0 takes the likeliest token. Without a prompt the text begins after a line break that
        is not shown (or after the vocabulary's first token, where there is none). The same seed gives the same text.

        Raises InputError for a model of something else, a prompt that is empty or cannot be encoded, settings out of range.
        """
        ids = self.first_tokens(prompt, tokens, temperature)
        check_seed(seed)
        shown = 0 if prompt is not None else len(ids)
        context, device = self.preprocessing.shape[0], next(self.network.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        was_training = self.network.training
        self.network.eval()
        for _ in range(tokens):
            logits = self.network(torch.tensor([ids[-context:]], device=device))[0, -1].double().cpu()  # [C]
            if not logits.isfinite().all():
                raise InputError("the model's output holds NaN or infinity; its weights are damaged")
            if temperature == 0:
                ids.append(int(logits.argmax()))
            else:
                ids.append(int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)))
        self.network.train(was_training)
        return self.preprocessing.tokenizer.decode(ids[shown:])

    def first_tokens(self, prompt: str | None, tokens: int, temperature: float) -> list[int]:
        """The token ids that `generate` begins with. Raises what it raises."""
        if self.preprocessing.kind != TEXT:
            raise InputError(f"this model was trained on a data set of kind {self.preprocessing.kind!r}; only text has samples")
        if not isinstance(tokens, int) or tokens < 1:
            raise InputError(f"tokens of a sample must be a whole number of at least 1, got {tokens!r}")
        if not (isinstance(temperature, int | float) and math.isfinite(temperature) and temperature >= 0):
            raise InputError(f"temperature must be a finite number of at least 0, got {temperature!r}")
        tokenizer = self.preprocessing.tokenizer
        if prompt is None:
            try:
                return tokenizer.encode("\n", "a line break").tolist() or [0]
            except InputError:
                return [0]
        ids = tokenizer.encode(prompt, f"prompt {prompt!r}").tolist()
        if not ids:
            raise InputError(f"prompt {prompt!r} has no token; give at least one, or leave it out")
        return ids


def check_exit(network: Sequential, exit: int | str | None) -> int | str | None:
    """`exit`, if the network can answer there. Raises InputError where it cannot."""
    answers = network.exits
    if exit not in (None, "mean") and not (isinstance(exit, int) and 1 <= exit <= answers):
        raise InputError(f"exit must be a stage from 1 to {answers}, or mean, got {exit!r}")
    if exit is not None and answers == 1:
        raise InputError(f"exit {exit!r} has no effect: only the last stage of this network answers")
    return exit


def check_fit(network: Sequential, preprocessing: Preprocessing) -> None:
    """Raise InputError where a network does not take such inputs or give such outputs."""
    text = preprocessing.kind == TEXT
    shape = preprocessing.shape if text or preprocessing.kind == TENSORS else (preprocessing.in_features,)
    positions = preprocessing.shape[0] if text else 1
    if math.prod(shape) > LARGEST_INPUT:
        raise InputError(f"an input of {math.prod(shape):,} numbers is too large; allowed are {LARGEST_INPUT:,}")
    example = torch.zeros(1, *shape, dtype=torch.int64 if text else next(network.parameters()).dtype)
    network.prepare(example, preprocessing.target.outputs, None, positions)


def load(
    folder: str | Path, device: str | torch.device = "cpu", exit: int | str | None = None, which: str | None = None
) -> Predictor:
    """The model that a run left in its folder, or `hf:owner/name` on the hub, in eval mode. Raises InputError for none.

    `which`: the `best` model, by the figures on the test data, or the `last`; by default the best where it was kept. The
    predictor's `repr` begins with which it is.

    Of a network that has learned from local errors, `exit` says which stage answers: a number from 1, or the `mean` of all.

    Only JSON and safetensors are read, and every size is checked before it is used.
    """
    named = str(folder)
    folder = fetch(named.removeprefix(PREFIX)) if named.startswith(PREFIX) else Path(folder).expanduser()
    config = read_config(folder)
    preprocessing = Preprocessing.from_json(config["preprocessing"])
    network = build_network(config["network"])
    network.exit = check_exit(network, exit)
    which, path = model_file(folder, which)
    load_weights(network, path)
    for parameter in network.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    check_fit(network, preprocessing)
    return Predictor(network, preprocessing, config["loss"], which).to(device).eval()
