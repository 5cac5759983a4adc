"""A step of a run, and an evaluation, on tensors that have shapes but no memory: the most that they would hold.

Every operation is the one that will run, so nothing has to be known here of who keeps what for how long.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import weakref
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..base.data import Visit
from ..base.precision import autocast
from ..learn.local import Local
from ..learn.loss import hits, mean_loss
from ..learn.narrow import Narrow
from ..learn.peers import make_learner
from ..learn.step import Output
from ..network.layers import Layers
from ..network.sequential import Sequential
from ..network.stage import Stage
from ..network.updater import Arithmetic
from .settings import Settings
from .tally import CHECK_EVERY, KEPT_OUTPUTS, Tally

CPU = torch.device("cpu")


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations have made inside and that still are, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, operation: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        found = operation(*args, **(kwargs or {}))
        for tensor in tree_iter(found):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.bytes += storage.nbytes()
            self.most = max(self.most, self.bytes)
            weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


def rehearse(
    settings: Settings, network: Sequential, x: Tensor, outputs: int, positions: int, steps: int = 1, tested: int = 0
) -> int:
    """The most bytes that a run holds beside its data and error rows, by the torch backend on a CPU.

    `network` and a batch `x [batch, ...]` are on the meta device, with the readings that local errors need. Outputs of up to
    `steps` steps wait for their loss to be taken; an evaluation is of up to `tested` samples (0: there is none).
    """
    types, shape, signal = settings.types, x.shape[1:], settings.resolved_signal
    loss = settings.loss if settings.loss != "auto" else "cross-entropy" if positions > 1 else "bce"
    rows, dtype, width = len(x) * positions, types.working, settings.error_rank or outputs
    inputs = dtype if x.is_floating_point() else x.dtype
    with FakeTensorMode(allow_non_fake_inputs=True), Alive() as alive:
        network = _without_memory(network, types.parameters)
        data = SimpleNamespace(
            device=CPU,
            positions=positions,
            fetch=lambda index, dtype: torch.empty(len(index), *shape, dtype=inputs),
            one_hot=lambda index, dtype: torch.empty(len(index) * positions, outputs, dtype=dtype),
        )
        store = local = None
        if settings.keeps_errors:
            store = SimpleNamespace(read=lambda row: torch.empty(rows, width, dtype=dtype), write=lambda *row: None)
        if signal is not None and settings.error_rank is not None:
            signal = replace(signal, projection=torch.empty(outputs, width, dtype=dtype))
        if signal is not None and signal.through_feedback:
            with torch.no_grad():
                network.prepare(data.fetch(range(1), dtype), outputs, None, positions)
            _give_feedback(network, width)
        if signal is not None and signal.local:
            narrow = Narrow(settings.local_positions, settings.local_candidates, settings.seed)
            local = Local(loss, network, settings.reach, narrow)
        update = settings.moments, settings.clip_norm
        how = Arithmetic(settings.rule, _operations(), CPU, types.products, settings.seed, *update)
        learner = make_learner(settings.method, network, data, loss, how, signal, settings.hidden_scale, store, local)
        visit = Visit(*[torch.empty(len(x), dtype=torch.int64)] * 2)
        learner.visit(visit, 1e-3)  # after which moments and buffers are kept
        tally = Tally(loss, outputs, CPU)
        tally.sizes = [rows] * max(1, min(steps, -(-KEPT_OUTPUTS // (rows * outputs)), CHECK_EVERY))
        tally.waits = len(tally.sizes)
        for _ in tally.sizes[1:]:
            tally.waiting.append(Output(*(torch.empty(rows, outputs, dtype=dtype) for _ in range(2))))
        alive.most = alive.bytes
        tally.waiting.append(learner.visit(visit, 1e-3))
        tally._finish()
        if tested:
            index = range(min(tested, max(1, settings.eval_batch_size // positions)))
            with torch.no_grad(), autocast(CPU, types.products):
                target, a = data.one_hot(index, dtype), network.eval()(data.fetch(index, dtype)).flatten(0, -2)
            mean_loss(a.to(dtype), target, loss), hits(a, target)
        return alive.most


def _operations() -> ModuleType:
    """The torch backend again, with buffers of its own; of the parts in which a large weight is updated, two do for all."""
    spec = importlib.util.find_spec("..kernels.eager", __package__)
    operations = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(operations)
    every = operations._parts
    operations._parts = lambda rows, columns, elements: itertools.islice(every(rows, columns, elements), 2)
    return operations


def _without_memory(network: Sequential, parameters: torch.dtype) -> Sequential:
    """The same network, in training, of the tensors that are made here."""
    made: dict[int, object] = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=parameters), p.requires_grad) for p in network.parameters()
    }
    made |= {id(b): torch.empty(b.shape, dtype=b.dtype) for b in network.buffers()}
    network = copy.deepcopy(network, made).train()
    for stage in network.modules():
        stage.draws = False  # random numbers need no memory of their own
    return network


def _give_feedback(network: Sequential, width: int) -> None:
    """Matrices without entries, of every stage that learns through one."""
    for stage in network.stages[:-1]:
        inner = [part for part in stage.modules() if isinstance(part, Stage) and part is not stage]
        for own in inner if isinstance(stage, Layers) else [stage]:
            units = own.output_shape.numel()
            if own.feedback_shape.startswith("shared"):
                units = own.output_shape[0 if len(own.output_shape) == 3 else -1]
            if own.feedback_shape.endswith("generated"):
                own.generated = own.feedback_law.generated(width, units, 0)
            else:
                like = next(own.parameters(), torch.empty(0))
                own.feedback_matrix = torch.empty(width, units, dtype=like.dtype)
