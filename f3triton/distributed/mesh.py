"""The processes of a run: how many there are, which place each has, what they say to one another before the first step."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..base.exceptions import InputError
from .links import watching

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

WORDS = ("off", "auto")


@dataclass(frozen=True)
class Place:
    """Where a process stands: `worker` of the `workers` of a pipeline, in `replica` of `replicas`. With `threads` the workers
    are threads of this process, which is worker 0."""

    worker: int = 0
    workers: int = 1
    replica: int = 0
    replicas: int = 1
    threads: bool = False
    mesh: DeviceMesh | None = None  # of processes: ("data", "pipeline")

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's folder and tells of it."""
        return self.worker == 0 and self.replica == 0

    def peer(self, worker: int) -> int:
        """The rank of another worker of the same pipeline."""
        return int(self.mesh.mesh[self.replica, worker])


def parse_pipeline(word: int | str) -> tuple[int | str, bool]:
    """`(workers, threads)` of off, auto, 2 or threads:2. Raises InputError for another word."""
    found = re.fullmatch(r"(threads:)?([1-9]\d{0,5})", str(word))
    if found:
        return int(found[2]), found[1] is not None
    if word in WORDS:
        return word, False
    raise InputError(f"pipeline {word!r} is unknown; allowed: off, auto, a number of processes (2), or of threads (threads:2)")


def processes() -> tuple[int, int]:
    """(rank, how many) of the processes that a launcher such as torchrun has started."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def require_a_task(pipeline: int | str, replicas: int) -> None:
    """Raise InputError where there are several processes and nothing says what each of them is to do, or they are too many or
    too few."""
    world = processes()[1]
    if world > 1 and pipeline == "off" and replicas == 1:
        raise InputError(
            f"{world} processes were started, and nothing says what each is to do; add --pipeline auto (a part of the network "
            f"each) or --data-parallel {world} (a part of every batch each)"
        )
    count_workers(pipeline, replicas)


def count_workers(pipeline: int | str, replicas: int) -> int:
    """How many workers each pipeline has. Raises InputError where so many processes have not been started."""
    workers, threads = parse_pipeline(pipeline)
    world = processes()[1]
    if threads:
        if world > 1 or replicas > 1:
            raise InputError(f"pipeline {pipeline!r} is for one process, got {max(world, replicas)}; use --pipeline {workers}")
        return workers
    if workers in WORDS:
        workers = 1 if workers == "off" else max(world // replicas, 1)
    needed = workers * replicas
    if needed not in (1, world):
        parts = [f"pipeline {workers}"] * (workers > 1) + [f"data parallel {replicas}"] * (replicas > 1)
        raise InputError(
            f"{' and '.join(parts)} needs {needed} processes, got {world}; start them by torchrun --nproc-per-node {needed} "
            "train.py ..." + f", or use threads of one process: --pipeline threads:{workers}" * (replicas == 1)
        )
    return workers


def join(pipeline: int | str, replicas: int) -> Place:
    """The place of this process; of several, each calls this. Raises InputError, see `count_workers`."""
    workers, rank = count_workers(pipeline, replicas), processes()[0]
    if workers * replicas == 1:
        return Place()
    if parse_pipeline(pipeline)[1]:
        return Place(workers=workers, threads=True)
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo", store=meeting_point(rank, world := processes()[1]), rank=rank, world_size=world)
    from torch.distributed.device_mesh import init_device_mesh  # not every torch has it

    mesh = init_device_mesh("cpu", (replicas, workers), mesh_dim_names=("data", "pipeline"))
    replica, worker = mesh.get_coordinate()
    return Place(worker, workers, replica, replicas, False, mesh)


def meeting_point(rank: int, world: int) -> dist.Store:
    """The store at which processes find one another, as torchrun's variables say; what an attempt before this one has left
    there is not read again."""
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise InputError(f"{world} processes need MASTER_ADDR and MASTER_PORT to find one another; use torchrun") from None
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return dist.PrefixStore(f"f3triton/{attempt()}", dist.TCPStore(*address, world, hosts))


def attempt() -> str:
    """How often torchrun has started the processes again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def exchange(place: Place, content: object) -> list[object]:
    """What each process says, as JSON has it, by rank. Raises Gone where one has ended."""
    if place.mesh is None:
        return [content]
    text = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
    sizes = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    with watching("another process"):
        dist.all_gather(sizes, torch.tensor([len(text)]))
        longest = int(max(sizes))
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - len(text))))
    return [json.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)]


def agree(place: Place, facts: dict[str, object]) -> None:
    """Raise InputError, in every process, where `facts` are not the same in all of them."""
    said = exchange(place, facts)
    for rank, other in enumerate(said):
        for name in sorted(said[0].keys() | other.keys()):
            if said[0].get(name) != other.get(name):
                raise InputError(
                    f"{name} must be the same in all processes, but it is {said[0].get(name)!r} in process 0 and "
                    f"{other.get(name)!r} in process {rank}"
                )


def part() -> None:
    """Leave the other processes, at the end of a script."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def first_to_say(reason: str, at_once: bool = False) -> bool:
    """Whether no other process has said before why the run ends; process 0 is heard first, but for what has to be said
    `at_once`."""
    rank, world = processes()
    if world == 1:
        return True
    if rank and not at_once:
        time.sleep(0.5)
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=3))
        key = f"f3triton/reason/{attempt()}"
        return store.compare_set(key, "", f"{rank}: {reason}").decode() == f"{rank}: {reason}"
    except (KeyError, ValueError, RuntimeError):  # no launcher of that kind, or it has ended
        return True
