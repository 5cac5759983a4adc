"""What F3's updates have to do with the true gradient, layer by layer, while a network trains.

A twin of the network gets the exact gradient by backpropagation on the same samples; nothing of it reaches the training.
Figures of a stage, at each call:

- `angle`: degrees between its F3 update and the true gradient, over all of its parameters. Below 90 the update still lowers
  the loss (arXiv 2304.13372, and feedback alignment: Lillicrap et al. 2016); `norm_ratio` is the one's norm over the other's
- `weights_angle`: degrees between `-B` and the product of the weights behind it, `W_L ... W_{l+1} [C, N]`, where all of
  those stages are Linear: what alignment is (the sign is that of the update, `+ e B` with `e = y* - y`)
- `separability`: percent of held-out samples that a linear readout, fitted by ridge regression, gets right from its output
- `rank`: effective rank of its error signal `[M, units]`: the exponential of the entropy of its singular values
  (Roy and Vetterli 2007); it cannot exceed C
- `moved`: norm of the change of its parameters since the last call over their norm
- `readable`, with local errors: percent of the samples (or tokens) that its own reading gets right, and `adds`, how many points
  more that is than what the stage before it says. Their `angle` is that of the readings' gradient

And of the error, where it is delayed: `error_cosine` of the stored error and the present one, and `sign_flips`, the share of
entries that changed sign: how stale it is.
"""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from ..base.data import batch
from ..base.exceptions import InputError
from ..base.precision import working_dtype
from ..data import Dataset, StreamDataset
from ..kernels.reference import error_signal
from ..learn.loss import mean_loss
from ..learn.step import Learner
from ..network.head import Head
from ..network.linear import Linear
from ..network.sequential import Sequential
from .curves import FEW, can_draw, new_figure, plain_axes, save, scale_values
from .folder import _named, json_text
from .trainer import Trainer

Record = dict[str, object]


class Diagnostics:
    """Figures of the stages on `samples` fixed training samples; call it with a record of `fit`: `on_record=diagnostics`.

    `records` holds one dict a call, `warnings` what should not be. Changes nothing in the training, and draws no random number
    of its.
    """

    def __init__(self, trainer: Trainer, train: Dataset, samples: int = 512) -> None:
        if samples < 4:
            raise InputError(f"diagnostics need at least 4 samples, got {samples}")
        if isinstance(train, StreamDataset):
            raise InputError("diagnostics (--diagnose) look at the same samples again and again, which a stream does not keep")
        self.trainer, self.train = trainer, train
        generator = torch.Generator().manual_seed(trainer.seed)
        self.index = torch.randperm(len(train), generator=generator)[: min(samples, len(train))]
        self.records: list[Record] = []
        self.warnings: list[str] = []
        self.before: list[Tensor] = [_flat(stage) for stage in trainer.model.stages]
        self.last_error: Tensor | None = None

    def __call__(self, record: Record) -> None:
        """Take the figures after the epoch that `record` is of."""
        trainer, learner = self.trainer, self.trainer.learner
        data = trainer.place(self.train)
        twin = copy.deepcopy(trainer.model).to(working_dtype(trainer.model)).eval()
        x, target = batch(data, self.index.to(data.device), working_dtype(twin), trainer.device)
        loss = learner.loss
        exact, features, output = _exact_gradients(twin, x, target, loss)
        found: Record = {"epoch": record["epoch"]}
        error, stored = None, None
        signal = learner.signal
        if signal is not None and not signal.local and signal.source != "none":
            error = error_signal(output, target, loss, signal.source, signal.link)
            error = signal.kept(error, target)  # [M, R], the present one
            stored = self._taught_by(learner, target, error)
            if signal.delayed and self.records:
                found |= _staleness(stored, error)
            stored = signal.taught(stored, target)
        self.last_error = error
        if signal is not None and signal.local:
            self._local_figures(found, twin, features, exact, target)
            self._warn(found, learner)
            self.records.append(found)
            return
        found["stages"] = [
            self._stage(position, twin, features, exact[position], stored, target) for position in range(len(twin.stages))
        ]
        self._warn(found, learner)
        self.records.append(found)

    def _taught_by(self, learner: Learner, target: Tensor, error: Tensor) -> Tensor:
        """The error that the hidden stages of these samples learn from at their next visit, `[M, R]`."""
        target = learner.signal.kept(target, target)
        if learner.signal.current:
            return error
        if not learner.signal.delayed:
            return target
        if learner.store.samples == len(self.train):
            return learner.store.read(self.index.to(learner.device)).to(error.dtype)
        return target if self.last_error is None else self.last_error  # in windows, whose store holds other samples by now

    def _stage(
        self, position: int, twin: nn.Module, features: list[Tensor], exact: Tensor, error: Tensor | None, target: Tensor
    ) -> dict[str, float | None]:
        stage, h = twin.stages[position], features[position + 1]
        now, was = _flat(self.trainer.model.stages[position]), self.before[position]
        self.before[position] = now
        figures: dict[str, float | None] = {
            "moved": float((now - was).norm() / now.norm().clamp_min(1e-30)) if len(now) else None
        }
        if self.train.task == "classification" and len(h) >= 4:
            figures["separability"] = separability(h.flatten(1), target)
        if position == len(twin.stages) - 1 or error is None or stage.feedback is None:
            return figures
        signal = stage.error_signal(error, h)  # e B in the output's shape
        own = _own_gradient(stage, features[position], signal)
        figures |= {"angle": angle(own, exact), "norm_ratio": float(own.norm() / exact.norm().clamp_min(1e-30))}
        figures["rank"] = effective_rank(signal.flatten(1))
        behind = list(twin.stages)[position + 1 :]
        if all(isinstance(s, Linear) for s in behind) and isinstance(stage, Linear):
            product = behind[-1].weight.detach()
            for layer in reversed(behind[:-1]):
                product = product @ layer.weight.detach()
            matrix = stage.feedback if stage.generated is None else stage.generated.dense(product.device)
            matrix = matrix.to(product.dtype)
            projection = self.trainer.learner.signal.projection
            if projection is not None:
                matrix = projection.to(product.dtype) @ matrix  # [C, N]
            figures["weights_angle"] = angle(-matrix.flatten(), product.flatten())
        return figures

    def _local_figures(
        self, found: Record, twin: Sequential, features: list[Tensor], exact: list[Tensor], target: Tensor
    ) -> None:
        """Figures of the stages of a network that learns from its own readings."""
        found["stages"], before = [], None
        for position, stage in enumerate(twin.stages):
            figures = self._stage(position, twin, features, exact[position], None, target)
            if position < len(twin) - 1 and next(stage.parameters(), None) is not None:
                own = _local_gradient(
                    twin, position, features[position], target, self.trainer.settings.reach, self.trainer.learner.loss
                )
                figures |= {"angle": angle(own, exact[position])}
                figures["norm_ratio"] = float(own.norm() / exact[position].norm().clamp_min(1e-30))
            answers = twin.unread <= position < twin.read or position == len(twin) - 1
            if answers and self.train.task != "regression":
                with torch.no_grad():
                    h = features[position + 1]
                    a = (h if position == len(twin) - 1 else twin.answer(position, h)).flatten(0, -2)
                figures["readable"] = 100 * float((a.argmax(1) == target.argmax(1)).double().mean())
                if before is not None:
                    figures["adds"] = figures["readable"] - before
                before = figures["readable"]
            found["stages"].append(figures)

    def _warn(self, found: Record, learner: object) -> None:
        hidden_learn = learner.signal is None or learner.signal.source != "none"
        for position, figures in enumerate(found["stages"]):
            last = position == len(found["stages"]) - 1
            if (hidden_learn or last) and figures["moved"] == 0:
                self.warnings.append(f"stage {position + 1} received no update in the time before epoch {found['epoch']}")

    def save(self, folder: Path) -> None:
        """Write `diagnostics.json` and `diagnostics.png` into a folder. Raises InputError where they cannot be written."""
        content = {"samples": len(self.index), "warnings": self.warnings, "records": self.records}
        with _named(folder, "write diagnostics to"):
            (folder / "diagnostics.json").write_text(json_text(content, indent=1), encoding="utf-8")
            draw(self.records, folder / "diagnostics.png")


def angle(a: Tensor, b: Tensor) -> float | None:
    """Degrees between two vectors; None where one of them is zero."""
    a, b = a.double(), b.double()
    norms = float(a.norm() * b.norm())
    return None if norms == 0 else math.degrees(math.acos(max(-1.0, min(1.0, float(a @ b) / norms))))


def effective_rank(matrix: Tensor) -> float:
    """The exponential of the entropy of the singular values, as shares of their sum; 0 for a matrix of zeros."""
    singular = torch.linalg.svdvals(matrix.double())
    if not float(singular.sum()):
        return 0.0
    share = singular / singular.sum()
    return float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum()))


def separability(features: Tensor, target: Tensor, ridge: float = 1e-2) -> float:
    """Percent of the second half of the samples that a linear readout fitted on the first half gets right."""
    features = features.double()
    half = len(features) // 2
    mean, scale = features[:half].mean(0), features[:half].std(0).clamp_min(1e-6)
    x = torch.cat([(features - mean) / scale, torch.ones(len(features), 1, dtype=torch.float64, device=features.device)], 1)
    known, y = x[:half], target[:half].double()
    products = known @ known.T  # [half, half]: the dual form, for there may be more features than samples
    weights = known.T @ torch.linalg.solve(products + ridge * products.diagonal().mean() * torch.eye(half).to(known), y)
    return 100 * float(((x[half:] @ weights).argmax(1) == target[half:].argmax(1)).double().mean())


def _flat(stage: nn.Module) -> Tensor:
    return torch.cat([torch.empty(0), *(p.detach().float().flatten().cpu() for p in stage.parameters())])


def _exact_gradients(twin: nn.Module, x: Tensor, target: Tensor, loss: str) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(the true gradient of every stage, flat; the input and every stage's output; the last one's)."""
    features = [x]
    with torch.enable_grad():
        for stage in twin.stages:
            features.append(stage(features[-1]))
        output = features[-1].flatten(0, -2)  # [M, C]
        mean_loss(output, target, loss).backward()
    gradients = [
        torch.cat([torch.empty(0, device=x.device), *(_gradient(p).flatten() for p in stage.parameters())])
        for stage in twin.stages
    ]
    return gradients, [f.detach() for f in features], output.detach()


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _own_gradient(stage: nn.Module, x: Tensor, signal: Tensor) -> Tensor:
    """What the update rule gets from F3, flat: the gradient of `sum(h * e B)` with the input held fixed."""
    parameters = [p for p in stage.parameters() if p.requires_grad]
    with torch.enable_grad():
        gradients = torch.autograd.grad((stage(x) * signal).sum(), parameters, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return torch.cat([g.flatten() for g in flat])


def _local_gradient(twin: Sequential, position: int, x: Tensor, target: Tensor, reach: int, loss: str) -> Tensor:
    """What the update rule gets from local errors for the stage in that position with input `x`, flat (see `learn.local`)."""
    hidden, last = list(twin.stages[:-1]), max(position, twin.unread) + reach - 1  # the last stage whose reading it hears
    parameters = [p for p in hidden[position].parameters() if p.requires_grad]
    with torch.enable_grad():
        h, total = x.detach(), torch.zeros((), dtype=x.dtype if x.is_floating_point() else torch.float32, device=x.device)
        for place in range(position, len(hidden) if last >= twin.read else last + 1):
            h = hidden[place](h)
            if twin.unread <= place < twin.read and place <= last:
                total = total + _reading_loss(twin, place, h, target, loss)
        if last >= twin.read:
            total = total + mean_loss(twin.stages[-1](h).flatten(0, -2), target, loss)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return torch.cat([g.flatten() for g in flat])


def _reading_loss(twin: Sequential, place: int, h: Tensor, target: Tensor, loss: str) -> Tensor:
    """A scalar whose gradient at `h` is that of the reading in that place, which random feedback makes another one."""
    value = mean_loss(twin.answer(place, h).flatten(0, -2), target, loss)
    head = None if twin.heads is None else twin.heads[place]
    if not isinstance(head, Head) or not head.random:
        return value
    a = head(h).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(mean_loss(a, target, loss), a)
    return (head.normal_rows(h) * (gradient @ head.feedback_matrix.to(gradient.dtype))).sum()


def _staleness(stored: Tensor, present: Tensor) -> dict[str, float]:
    cosine = float((stored.flatten() @ present.flatten()) / (stored.norm() * present.norm()).clamp_min(1e-30))
    return {"error_cosine": cosine, "sign_flips": float((stored.sign() * present.sign() < 0).double().mean())}


PANELS = {
    "angle": "angle of the update to the true gradient, degrees;\nabove 90 a step goes uphill",
    "weights_angle": "angle of -B to the weights behind it, degrees",
    "norm_ratio": "norm of the update over that of the gradient",
    "rank": "effective rank of the error signal",
    "separability": "right by a linear readout, percent",
    "readable": "right by the stage's own head, percent",
    "moved": "change of the parameters, relative",
}


def draw(records: list[Record], path: Path) -> None:
    """A panel for each figure, a line for each stage, the darkest the first; nothing where there are no records."""
    if not records or not can_draw():
        return
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(13, 7, layout="constrained")
    epochs = [record["epoch"] for record in records]
    stages = len(records[0]["stages"])
    named = {round(position * (stages - 1) / 5) for position in range(6)}  # six in the legend tell the scale
    panels = {
        name: title
        for name, title in PANELS.items()
        if any(stage.get(name) is not None for record in records for stage in record["stages"])
    }
    places = list(figure.subplots(2, 3).flat)
    for axes in places[len(panels) :]:
        axes.axis("off")
    for axes, (name, title) in zip(places, panels.items(), strict=False):
        drawn = []
        for position in range(stages):
            line = [record["stages"][position].get(name) for record in records]
            if any(value is not None for value in line):
                values = [math.nan if value is None else value for value in line]
                colour = colormaps["viridis"](position / max(stages - 1, 1) * 0.9)
                label = f"stage {position + 1}" if position in named else None
                axes.plot(epochs, values, marker="o" if len(epochs) <= FEW else "", ms=3, color=colour, label=label)
                drawn += [value for value in values if math.isfinite(value)]
        if "angle" in name:
            axes.axhline(90, color="#c0392b", linestyle="--", linewidth=1)
            axes.set(ylim=(0, 180), yticks=range(0, 181, 45))
        else:
            scale_values(axes, "y", drawn)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("epoch")
        plain_axes(axes)
    handles, labels = places[len(panels) - 1].get_legend_handles_labels()  # every stage that learns has moved
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    save(figure, path)


def summary_lines(diagnostics: Diagnostics) -> list[str]:
    """The last figures in words, and the warnings."""
    if not diagnostics.records:
        return []
    last = diagnostics.records[-1]
    angles = [f"{s['angle']:.0f}" for s in last["stages"] if s.get("angle") is not None]
    uphill = [str(number) for number, s in enumerate(last["stages"], 1) if (s.get("angle") or 0) > 90]
    told = f" (above 90 a step goes uphill, as in stage {', '.join(uphill)})" if uphill else " (below 90: downhill)"
    lines = [f"angle of the update to the true gradient, by stage, degrees: {', '.join(angles)}{told}"] if angles else []
    if not can_draw():
        lines.append("no pictures were written: they need matplotlib (pip install matplotlib)")
    reads = [
        f"{s['readable']:.1f}" + (f" ({s['adds']:+.1f})" if "adds" in s else "") for s in last["stages"] if "readable" in s
    ]
    if reads:
        lines.append(f"right by each stage's own head, percent (and what it adds): {', '.join(reads)}")
    if "error_cosine" in last:
        flips = f"{last['sign_flips']:.1%}"
        lines.append(f"stored error against the present one: cosine {last['error_cosine']:.2f}, signs flipped {flips}")
    return [*lines, *(f"warning: {text}" for text in itertools.islice(diagnostics.warnings, 5))]
