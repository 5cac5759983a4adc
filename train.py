"""Train a network with F3, or with one of its peers, on any Hugging Face data set: `python train.py --help`.

Reads from top to bottom: options, data, network, trainer, fit, report; all else has a room in `f3triton/run`. A training step
is three calls from here: `trainer.fit` goes through the epochs, the learner's `visit` fetches a batch, `learn` learns from it.
"""

from __future__ import annotations

import argparse
import sys
import time

from f3triton.run.options import given, given_in_file, look_over, make_settings, parse, refuse_what_has_no_effect, seeds_in

if __name__ == "__main__":
    look_over(sys.argv[1:])  # before torch is imported, which takes seconds

try:
    import torch
except ModuleNotFoundError as missing:
    if missing.name != "torch":
        raise
    print("train.py: error: needs PyTorch, which is not installed: pip install -c constraints.txt -e .", file=sys.stderr)
    sys.exit(2)

import f3triton as f3
from f3triton.data.targets import LANGUAGE_MODELING
from f3triton.distributed.links import Gone
from f3triton.distributed.mesh import first_to_say, part, processes, require_a_task
from f3triton.distributed.ring import WorkerFailed, lines_of
from f3triton.run.console import Console, tell
from f3triton.run.diagnostics import Diagnostics, summary_lines
from f3triton.run.dry_run import dry_run
from f3triton.run.evaluation import evaluate_run
from f3triton.run.hub import check_name, push
from f3triton.run.log import logged, require_log
from f3triton.run.parts import METHOD_NAMES, load_data, make_feedback, make_network, network_of, peers_of
from f3triton.run.prediction import predict_run
from f3triton.run.records import Record
from f3triton.run.report import report, store_line, title_of
from f3triton.run.samples import check_sample, sample_of, sample_run
from f3triton.run.seeds import train_seeds
from f3triton.run.start import Start
from f3triton.run.summary import write_summary
from f3triton.run.tally import Diverged
from f3triton.visits.windows import check_epochs


def train(options: argparse.Namespace, compare: bool, start: Start) -> None:
    began = time.perf_counter()
    say = (lambda line: None) if options.quiet or processes()[0] else tell

    # What needs no data is checked before any is read.
    settings = make_settings(options)
    require_a_task(options.pipeline, options.data_parallel)
    peers = peers_of(settings, options) if compare else []
    make_feedback(options)
    require_log(options.log)
    check_name(options.push_to_hub)
    check_epochs(options.epochs, settings.windows)

    data = train_set, test_set = load_data(options)
    say(f"{train_set.name}: {len(train_set):,} training and {len(test_set):,} test samples")
    for line in train_set.preprocessing.describe():
        say(f"  {line}")

    network = network_of(options, train_set)
    if options.dry_run:
        for line in dry_run(options, settings, network, data):
            say(line)
        return

    trainer = f3.Trainer(make_network(options, network, say), settings=settings)
    trainer.check(train_set, test_set, options.epochs, options.eval_every)
    is_text = train_set.task == LANGUAGE_MODELING
    if is_text:
        check_sample(trainer.model, train_set, options)
    say(f"{title_of(network)}, {trainer.describe()}")
    say(str(trainer.choice))
    store = trainer.store_for(train_set)
    if store is not None:
        say(store_line(*store))
    for line in trainer.describe_workers():
        say(line)
    fitted = {"epochs": options.epochs, "test": test_set, "eval_every": options.eval_every}
    if not trainer.seat.writes:  # another process writes the run down and tells of it
        if trainer.fit(train_set, **fitted, resume=start.snapshot).status == "interrupted":
            raise KeyboardInterrupt
        return

    diagnostics = None if options.diagnose is None else Diagnostics(trainer, train_set, options.diagnose)

    folder = start.open(trainer, train_set)  # nothing was written so far
    if start.snapshot is not None:
        say(f"going on after step {start.snapshot.state['steps']:,}, in epoch {start.snapshot.state['epoch'] + 1}")

    def keep(record: Record) -> None:
        console.record(record)
        if diagnostics is not None:
            diagnostics(record)
        folder.keep(record, trainer.model, options.keep_best and record is trainer.result.best)

    try:
        with (
            Console(options.quiet, options.epochs, len(train_set), trainer.method) as console,
            logged(options.log, folder.path, trainer, keep) as tell_all,
        ):
            result = trainer.fit(
                train_set,
                **fitted,
                on_record=tell_all,
                on_step=console.step,
                checkpoints=start.checkpoints,
                resume=start.snapshot,
            )
    except Diverged as error:
        result = trainer.result
        result.status = "diverged"
        if not folder.settled:
            raise f3.InputError(f"{error}; the run in {folder.path} is as it was") from None
        write_summary(folder, trainer, data, time.perf_counter() - began)
        kept = f"of epoch {result.history[-1]['epoch']}" if result.history else "from before the first epoch"
        raise f3.InputError(f"{error}; the model {kept} is kept in {folder.path}") from None
    if not folder.settled:  # Ctrl-C in the first step
        raise KeyboardInterrupt

    summary = write_summary(folder, trainer, data, time.perf_counter() - began)
    others: list[f3.Trainer] = []
    for peer in peers:
        if result.status != "completed":
            break
        say(f"the same network by {METHOD_NAMES[peer.method]}:")
        other = f3.Trainer(make_network(options, network), settings=peer)
        try:
            with (
                Console(options.quiet, options.epochs, len(train_set), other.method) as console,
                logged(options.log, folder.path, other, console.record, other.method) as tell_all,
            ):
                other.fit(train_set, **fitted, on_record=tell_all, on_step=console.step)
            result.status = other.result.status
            if result.status == "completed":
                others.append(other)
                summary = write_summary(folder, trainer, data, time.perf_counter() - began, others)
        except Diverged as error:
            say(f"no comparison: {error}")
    if diagnostics is not None:
        diagnostics.save(folder.path)
        for line in summary_lines(diagnostics):
            say(line)
    for line in report(summary, folder, train_set.preprocessing.target_names):
        say(line)
    if is_text and not options.quiet:
        say(f"a sample:\n{sample_of(trainer.model, train_set, options)}")
    for line in lines_of(result.workers):
        say(line)
    if options.push_to_hub is not None and result.status == "completed":
        say(push(folder.path, options.push_to_hub))
    if result.status == "interrupted":
        raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is 0, 2 for what cannot be done, or 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    typed = given(arguments)
    try:
        if seeds := seeds_in(arguments):
            return train_seeds(arguments, seeds, main, (lambda line: None) if "--quiet" in typed else tell)
        options = parse(arguments)
        if options.evaluate is not None or options.predict is not None:
            for line in (predict_run if options.evaluate is None else evaluate_run)(options, typed):
                if not options.quiet:
                    tell(line)
        elif options.sample is not None:
            tell(sample_run(options, typed))
        else:
            refuse_what_has_no_effect(options, typed | given_in_file(arguments))
            plain = not typed - {"--quiet", "--output-dir", "--overwrite"}
            with Start(options) as start:
                train(options, plain if options.compare is None else options.compare, start)
    except (f3.InputError, Diverged, WorkerFailed, Gone) as error:
        if first_to_say(str(error), isinstance(error, Gone)):
            print(f"train.py: error: {error}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, WorkerFailed | Gone) else 2
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        print("train.py: error: not enough memory; --dry-run shows what it is needed for", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if processes()[0] == 0:
            print("interrupted; what was evaluated and saved so far is kept", file=sys.stderr)
        return 130
    part()
    return 0


if __name__ == "__main__":
    sys.exit(main())
