"""Train a network with F3, or with one of its peers, on any Hugging Face data set: `python train.py --help`.

Reads from top to bottom: options, data, model, training, report.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from f3triton.kernels.dispatch import BACKENDS
from f3triton.kernels.reference import ACTIVATIONS, LINKS, LOSSES, SOURCES

import f3triton as f3
from f3triton.base.device import pick_device
from f3triton.base.precision import PRECISIONS, matmul_precision, resolve_precision
from f3triton.base.seeds import check_seed
from f3triton.base.text import readable_bytes
from f3triton.data import Dataset, StreamDataset
from f3triton.data.identity import identity
from f3triton.data.streams import BUFFER, STATISTICS
from f3triton.data.targets import LANGUAGE_MODELING
from f3triton.error_store import ERROR_DTYPES, Codec, check_home, is_folder, pick_home, remove_store
from f3triton.learn.signal import METHODS, resolve_loss, resolve_signal
from f3triton.models.build import MODELS, OPTIONS, build
from f3triton.models.build import describe as describe_network
from f3triton.models.transformer import GRANULARITIES, NORMS
from f3triton.models.vit import EMBEDDINGS, POOLS
from f3triton.network.feedback import LAWS, error_projection
from f3triton.network.stage import FEEDBACK_AT, FEEDBACK_SHAPES
from f3triton.network.updater import RULES, make_rule
from f3triton.recipes import open_data, read_recipe, recipe_names, split_name
from f3triton.run.budget import Budget, describe, mlp_budget
from f3triton.run.checkpoint import Checkpoints, Snapshot, newest, parse_every
from f3triton.run.console import Console, shown
from f3triton.run.diagnostics import Diagnostics, summary_lines
from f3triton.run.folder import CHECKPOINTS, FORMAT, RunFolder, read_json
from f3triton.run.network_budget import network_budget
from f3triton.run.records import Record, test_record
from f3triton.run.schedule import SCHEDULES
from f3triton.run.state import require_same, settings_of
from f3triton.run.summary import summarise, versions
from f3triton.run.tally import Diverged, evaluate
from f3triton.run.trainer import SWITCH, FitResult, Trainer, error_codec
from f3triton.visits.streams import check_stream
from f3triton.visits.windows import DEFAULT_VISITS, FIRST_VISITS, Windows, check_epochs, resolve_windows, steps_per_epoch

SAMPLE_TOKENS, TEMPERATURE = 300, 0.8


class Parser(argparse.ArgumentParser):
    """One line and exit code 2 for a bad option, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"train.py: error: {message} (python train.py --help shows all options)\n")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to every option's help, but for those that say it themselves."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def layer_sizes(text: str) -> list[int]:
    """`500` as [500], `500x3` as [500, 500, 500]."""
    found = re.fullmatch(r"(-?\d+)(?:x(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of units, such as 500, or 500x3 for three layers of 500")
    return [int(found[1])] * int(found[2] or 1)


def number_of_samples(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def own(option: str) -> str:
    """An option's default by kind of network, for its help."""
    values = {kind: its[option] for kind, its in OPTIONS.items() if option in its}
    values = {kind: "4 dim" if value is None else value for kind, value in values.items()}  # of an MLP in a block
    plain = {kind: " ".join(map(str, value)) if isinstance(value, list) else str(value) for kind, value in values.items()}
    one = set(plain.values())
    return f"; default: {one.pop() if len(one) == 1 else ', '.join(f'{value} ({kind})' for kind, value in plain.items())}"


def make_parser() -> Parser:
    parser = Parser(
        description="Train a neural network with no backward pass (F3), or with one of its peers.",
        epilog="With no options: F3 on the bundled handwritten digits, and backpropagation beside it.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("data").add_argument
    add("--recipe", metavar="NAME", help=f"an experiment of the paper, NAME or NAME/RUN: {', '.join(recipe_names())}")
    add("--dataset", metavar="NAME", help="hub name, folder, or parquet/csv/json file; default: digits, which is bundled")
    add("--dataset-config", metavar="NAME", help="configuration of a hub data set")
    add("--revision", help="revision of a hub data set")
    add("--train-split", metavar="NAME", help="split to train on; default: train")
    add("--test-split", metavar="NAME", help="split to test on; default: test, validation, or a part of the training split")
    add(
        "--test-fraction",
        type=float,
        metavar="F",
        help="that part's size; default: 0.2, drawn by the seed; the last 0.1 of a text",
    )
    add("--target", metavar="COLUMN", help="column to predict (several, with commas, in regression); default: by type and name")
    add("--features", nargs="+", metavar="COLUMN", help="columns to predict from; default: all others")
    add("--image", metavar="COLUMN", help="image column; default: by type")
    tasks = ("auto", "classification", "regression", LANGUAGE_MODELING)
    add("--task", choices=tasks, default="auto", help="auto: language-modeling with --text, else by the target's type")
    add("--text", metavar="FILE|COLUMN", help="learn to continue this text: a file, or a column of --dataset")
    add(
        "--tokenizer", metavar="KIND", help="of a text: characters, bytes, or the JSON file of a tokenizer; default: characters"
    )
    add("--context", type=int, metavar="N", help="tokens of a sample, a window of the text; default: 64")
    add(
        "--max-train-samples",
        type=int,
        metavar="N",
        help="train on N samples drawn by the seed (of a text, a stream: the first); default: all",
    )
    add("--max-test-samples", type=int, metavar="N", help="test on N samples, likewise; default: all")
    add("--streaming", action="store_true", help="read the data as it comes, in windows, and never hold all of it")
    add("--shuffle-buffer", type=int, metavar="N", help=f"rows of a stream that are mixed with one another; default: {BUFFER}")
    add("--statistics-rows", type=int, metavar="N", help=f"of a stream, for means, classes and so on; default: {STATISTICS}")

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=tuple(MODELS), help="kind of network; default: mlp, of a text gpt")
    add("--activation", choices=ACTIVATIONS, help="of the hidden layers; default: tanh, gelu (gpt)")
    units = f"mlp, convnet: units of layers, 500x3: three of 500{own('hidden')}"
    add("--hidden", type=layer_sizes, nargs="+", metavar="N", help=units)
    add("--channels", type=int, nargs="+", metavar="N", help=f"convnet: of each convolution{own('channels')}")
    add("--kernel-size", type=int, metavar="N", help=f"convnet: of the convolutions{own('kernel_size')}")
    add("--depth", type=int, metavar="N", help=f"transformers: blocks{own('depth')}")
    add("--dim", type=int, metavar="N", help=f"transformers: features of a token{own('dim')}")
    add("--heads", type=int, metavar="N", help=f"transformers: attention heads{own('heads')}")
    add("--head-dim", type=int, metavar="N", help="transformers: features of a head; default: dim / heads")
    add("--mlp-width", type=int, metavar="N", help=f"transformers: units of the layer in a block{own('mlp_width')}")
    add("--dropout", type=float, metavar="P", help=f"transformers{own('dropout')}")
    add("--norm", choices=tuple(NORMS), help=f"vit: normalisation in the blocks{own('norm')}")
    add("--tied", action="store_true", default=None, help="gpt: the head's weight is the tokens' embedding too")
    add("--patch-size", type=int, metavar="N", help=f"vit: pixels of a patch's side{own('patch_size')}")
    add("--embedding", choices=EMBEDDINGS, help=f"vit: one layer from the whole image, or one for each patch{own('embedding')}")
    add("--position-embedding", action="store_true", default=None, help="vit: add a learned vector to each token")
    add("--pool", choices=POOLS, help=f"vit: what the head sees of the tokens{own('pool')}")
    direct = f"transformers: exact gradients inside each block, or each layer taught directly{own('granularity')}"
    add("--granularity", choices=GRANULARITIES, help=direct)

    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="f3", help="f3, its peers; fa (feedback alignment) and bp go backward")
    add("--signal", choices=SOURCES, help="what teaches the hidden layers; default: the method's own (f3: delayed-error)")
    add("--link", choices=LINKS, default="auto", help="of the output, before the error is taken; auto: the loss's own")
    add("--mask-target", action="store_true", help="multiply the error by the one-hot target")
    add("--feedback", default="trinomial", metavar="LAW", help=f"law of the feedback matrices: {', '.join(LAWS)}")
    add("--feedback-values", type=float, nargs="+", metavar="V", help="of discrete-uniform, cartesian-product; default: -1 0 1")
    add("--feedback-scale", type=number_or_word, default=1.0, metavar="S", help="factor: a number, ones, zeros or 1/C")
    add(
        "--feedback-shape",
        choices=FEEDBACK_SHAPES,
        help="tokens or pixels have own columns or share; generated: not stored; default: full, shared (gpt)",
    )
    add("--feedback-at", choices=FEEDBACK_AT, help=f"gpt: outputs as they are, or normalised{own('feedback_at')}")
    add("--error-rank", type=int, metavar="R", help="keep errors times a fixed random [C, R], which all feedback goes through")
    add("--hidden-scale", type=number_or_word, default=1.0, metavar="S", help="factor on the hidden gradient; mean: 1/batch")

    add = parser.add_argument_group("training").add_argument
    add(
        "--loss",
        choices=("auto", *LOSSES),
        default="auto",
        help="auto: bce for classification, mse for regression, cross-entropy for text",
    )
    add("--optimizer", choices=tuple(RULES), default="adam", help="update rule")
    add("--lr", type=float, help="learning rate; default: 5e-4 for adam and adamw, 1e-2 for sgd")
    add("--momentum", type=float, help="of sgd; default: 0")
    add("--nesterov", action="store_true", help="Nesterov momentum, of sgd")
    add("--weight-decay", type=float, help="default: 1e-2 for adamw, else 0")
    add("--lr-schedule", choices=SCHEDULES, default="cosine", help="of the learning rate, after the warmup")
    add("--warmup-steps", type=int, default=0, metavar="N", help="steps of linear warmup")
    add("--epochs", type=int, default=100, help="visits of every sample")
    add(
        "--error-store",
        default="auto",
        metavar="WHERE",
        help="of delayed errors: auto (the first that fits), device, memory, or a folder, with a slash: ./errors",
    )
    add(
        "--error-dtype",
        default="auto",
        metavar="TYPE",
        help=f"of their entries: auto (exact), {', '.join(ERROR_DTYPES)}, top-K, sampled-K",
    )
    add("--batch-size", type=int, default=50, metavar="N", help="samples a step")
    add("--eval-batch-size", type=int, default=1000, metavar="N", help="predictions at once in evaluation")
    add("--window", type=number_of_samples, default="off", metavar="N", help="visit N samples --visits times in a row; or auto")
    add("--visits", type=int, metavar="K", help=f"of every window; default: {DEFAULT_VISITS}")
    add(
        "--first-visit", choices=FIRST_VISITS, help="what a window's first visit teaches hidden layers; default: skip (nothing)"
    )
    add("--seed", type=int, default=0, help="of weights, feedback, sample order and splits")

    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--backend", choices=BACKENDS, default="auto", help="implementation of the layers")
    add("--cuda-graph", choices=SWITCH, default="auto", help="a step as one CUDA graph, where all stages are Linear")
    add(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="of the matrix products; weights are float32, but for float64 and bfloat16-weights",
    )
    add("--output-dir", metavar="FOLDER", help="where the run is written; default: runs/DATASET-METHOD-DATE-TIME")
    add("--overwrite", action="store_true", help="write over a run in the output folder, and over its error store")
    add("--checkpoint-every", metavar="N", help="save the whole run every N steps, or every N epochs (2e); default: never")
    add("--keep", type=int, default=2, metavar="K", help="checkpoints that are kept")
    add("--resume", metavar="WHERE", help="go on with a run: its folder; or auto: that of --output-dir, if it has begun")
    add("--eval-every", type=int, default=1, metavar="N", help="epochs between evaluations")
    add(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="train the same network by backpropagation too; default: only where no option is given",
    )
    add("--diagnose", type=int, nargs="?", const=512, metavar="N", help="compare updates with true gradients, on N samples")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--dry-run", action="store_true", help="print shapes, FLOPs and the memory budget, and stop")
    add("--evaluate", metavar="FOLDER", help="evaluate the model in a run's folder on its test data, and stop")

    add = parser.add_argument_group("text").add_argument
    add("--sample", metavar="FOLDER", help="write text from the language model in a run's folder, and stop")
    add("--tokens", type=int, metavar="N", help=f"of a sample; also of the one after training; default: {SAMPLE_TOKENS}")
    add("--prompt", metavar="TEXT", help="what a sample begins with; default: a line break")
    add("--temperature", type=float, metavar="T", help=f"of a sample; 0: always the likeliest token; default: {TEMPERATURE}")
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; those of a recipe are defaults, which others override."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.streaming:  # one pass over the stream
        parser.set_defaults(window="auto", epochs=options.visits or DEFAULT_VISITS)
        options = parser.parse_args(arguments)
    if options.recipe is not None:
        name, run = split_name(options.recipe)
        parser.set_defaults(dataset=None, **read_recipe(name).options_of(run))
        options = parser.parse_args(arguments)
        options.dataset = options.dataset or read_recipe(name).data.get("dataset")
    if options.resume not in (None, "auto"):
        stored = read_json(Path(options.resume).expanduser(), "config.json").get("options")
        if not isinstance(stored, dict) or not set(stored) <= set(vars(options)):
            raise f3.InputError(f"the configuration of the run {options.resume!r} cannot be read by this version")
        parser.set_defaults(**stored | {"resume": options.resume, "output_dir": options.resume, "overwrite": False})
        options = parser.parse_args(arguments)
    if options.text is None and options.dataset is None and options.recipe is None:
        options.dataset = "digits"
    if options.model is None:
        options.model = "mlp" if options.text is None else "gpt"
    if options.hidden is not None:
        layers = [size if isinstance(size, list) else layer_sizes(str(size)) for size in options.hidden]
        options.hidden = [size for layer in layers for size in layer]
    return options


# --- data, model, training --------------------------------------------------------------------------------------------


def title_of(network: dict[str, object]) -> str:
    """`MLP 64-500-10`, or the kind of network and its settings."""
    if network["model"] == "mlp":
        return f"MLP {'-'.join(map(str, network['sizes']))}"
    settings = (f"{name} {value}" for name, value in network.items() if name != "model" and value is not None)
    return f"{network['model']}: {', '.join(settings)}"


def load_data(options: argparse.Namespace) -> tuple[Dataset, Dataset]:
    for option in ("shuffle_buffer", "statistics_rows"):
        if getattr(options, option) is not None and not options.streaming:
            raise f3.InputError(f"--{option.replace('_', '-')} has no effect without --streaming; leave it out")
    if options.text is not None:
        return load_text(options)
    if options.task == LANGUAGE_MODELING:
        raise f3.InputError(f"task {LANGUAGE_MODELING!r} needs a text: --text FILE, or --text COLUMN with --dataset")
    for option in ("tokenizer", "context", "tokens", "prompt", "temperature"):
        if getattr(options, option) is not None:
            raise f3.InputError(f"--{option} has no effect without --text")
    source = options.dataset
    if options.recipe is not None:
        source = open_data(read_recipe(split_name(options.recipe)[0]), source)
    load, of_stream = f3.load_dataset, {}
    if options.streaming:
        given = {"shuffle_buffer": options.shuffle_buffer, "statistics_rows": options.statistics_rows}
        load, of_stream = f3.stream_dataset, {name: value for name, value in given.items() if value is not None}
    data = load(
        source,
        config=options.dataset_config,
        revision=options.revision,
        train_split=options.train_split,
        test_split=options.test_split,
        test_fraction=0.2 if options.test_fraction is None else options.test_fraction,
        target=options.target,
        features=options.features,
        image=options.image,
        task=options.task,
        max_train_samples=options.max_train_samples,
        max_test_samples=options.max_test_samples,
        seed=options.seed,
        **of_stream,
    )
    if not isinstance(source, str):  # a table as the recipe has it
        for part in data:
            part.name = split_name(options.recipe)[0]
    return data


def load_text(options: argparse.Namespace) -> tuple[Dataset, Dataset]:
    if options.task not in ("auto", LANGUAGE_MODELING):
        raise f3.InputError(f"--text is for the task {LANGUAGE_MODELING!r}, got --task {options.task}")
    for option in ("target", "features", "image", "streaming"):
        if getattr(options, option) not in (None, False):
            raise f3.InputError(f"--{option} has no effect with --text; leave it out")
    settings = {name: getattr(options, name) for name in ("tokenizer", "context", "test_fraction")}
    return f3.load_text(
        options.text,
        options.dataset,
        config=options.dataset_config,
        revision=options.revision,
        train_split=options.train_split,
        test_split=options.test_split,
        max_train_samples=options.max_train_samples,
        max_test_samples=options.max_test_samples,
        **{name: value for name, value in settings.items() if value is not None},
    )


def feedback_and_rule(options: argparse.Namespace) -> tuple[f3.Feedback, f3.Adam | f3.SGD]:
    rule = make_rule(
        options.optimizer,
        lr=options.lr,
        momentum=options.momentum,
        nesterov=options.nesterov or None,
        weight_decay=options.weight_decay,
    )
    return f3.Feedback(options.feedback, options.feedback_values, options.feedback_scale), rule


def windows_of(options: argparse.Namespace) -> Windows | None:
    signal = resolve_signal(options.method, options.signal)
    delayed = signal is not None and signal.delayed
    return resolve_windows(options.window, options.visits, options.first_visit, options.batch_size, delayed)


def network_of(options: argparse.Namespace, train_set: Dataset) -> dict[str, object]:
    """The description of the network (see `f3triton.models.build`)."""
    names = {name for options_of_model in OPTIONS.values() for name in options_of_model}
    return describe_network(options.model, train_set, {name: getattr(options, name) for name in names}, options.activation)


def make_trainer(
    options: argparse.Namespace, network: dict[str, object], method: str, signal: str | None, in_windows: bool = True
) -> Trainer:
    """The network and its trainer: the same first weights for the same seed, whatever the method."""
    feedback, rule = feedback_and_rule(options)
    windows = {"window": options.window, "visits": options.visits, "first_visit": options.first_visit} if in_windows else {}
    if options.streaming and not in_windows:
        windows = {"window": options.window, "visits": options.visits}
    kept = ("error_store", "error_dtype", "error_rank")
    errors = {name: getattr(options, name) for name in kept} if in_windows else {}
    torch.manual_seed(options.seed)
    return Trainer(
        build(network, feedback),
        options.loss,
        rule,
        method=method,
        signal=signal,
        link=options.link,
        mask_target=options.mask_target,
        hidden_scale=options.hidden_scale,
        lr_schedule=options.lr_schedule,
        warmup_steps=options.warmup_steps,
        batch_size=options.batch_size,
        eval_batch_size=options.eval_batch_size,
        seed=options.seed,
        device=options.device,
        backend=options.backend,
        precision=options.precision,
        cuda_graph=options.cuda_graph,
        **windows,
        **errors,
    )


def fit(
    trainer: Trainer,
    options: argparse.Namespace,
    data: tuple[Dataset, Dataset],
    on_record: Callable[[Record], None] | None = None,
    checkpoints: Checkpoints | None = None,
    resume: Snapshot | None = None,
) -> FitResult:
    train_set, test_set = data
    console = Console(options.quiet, options.epochs, len(train_set), trainer.method)

    def record(figures: Record) -> None:
        console.record(figures)
        if on_record is not None:
            on_record(figures)

    try:
        return trainer.fit(
            train_set, options.epochs, test_set, eval_every=options.eval_every, on_record=record, on_step=console.step,
            checkpoints=checkpoints, resume=resume,
        )  # fmt: skip
    finally:
        console.close()


def checkpoint_to_resume(options: argparse.Namespace) -> Snapshot | None:
    """The newest sound checkpoint of the run that `--resume` names; damaged ones are told of.

    None where nothing is to be resumed, or `auto` finds no checkpoint yet: then the run begins anew.
    """
    if options.resume is None:
        return None
    if options.overwrite:
        raise f3.InputError("--overwrite and --resume cannot go together; leave one out")
    if options.output_dir is None:
        raise f3.InputError("--resume auto needs --output-dir, the run's folder")
    folder = Path(options.output_dir).expanduser()
    warn = lambda line: print(f"train.py: warning: {line}", file=sys.stderr)  # noqa: E731
    found = newest(folder / CHECKPOINTS, warn)
    if found is None and options.resume != "auto":
        raise f3.InputError(f"run {options.resume!r} has no checkpoint to go on from")
    if found is None and (folder / "summary.json").exists():
        raise f3.InputError(f"run {str(folder)!r} has ended, and left no checkpoint to go on from; choose another folder")
    return found


def begun_before(options: argparse.Namespace) -> dict[str, object] | None:
    """The options of the run that `--resume auto` finds begun, without a checkpoint yet: it begins again."""
    if options.resume is None or not (Path(options.output_dir).expanduser() / "config.json").exists():
        return None
    stored = read_json(Path(options.output_dir).expanduser(), "config.json").get("options")
    return stored if isinstance(stored, dict) else {}


def refuse_what_has_no_effect(options: argparse.Namespace, given: set[str]) -> None:
    """An option that the method does not use is an error, not a silent nothing."""
    signal = resolve_signal(options.method, options.signal)
    idle = {"--hidden-scale", "--link", "--mask-target", "--error-rank", "--feedback", "--feedback-values", "--feedback-scale"}
    if signal is not None and signal.source != "none":
        idle = {"--link"} if signal.source == "target" else set()
    if signal is None or not signal.delayed:
        idle |= {"--error-store", "--error-dtype"}
    for option in sorted(idle & given):
        taught = f"the method {options.method!r}" if signal is None else f"the signal {signal.source!r}"
        raise f3.InputError(f"{option} has no effect with {taught}; leave it out, or choose another --method or --signal")


def dry_budget(options: argparse.Namespace, network: dict[str, object], data: tuple[Dataset, Dataset]) -> tuple[Budget, str]:
    """The needs of the run, by arithmetic, and a line about its error store; of the network only the shapes are made."""
    with torch.device("meta"):
        shapes = build(network)
    if options.batch_size < 1:
        raise f3.InputError(f"batch size must be a whole number of at least 1, got {options.batch_size}")
    _, rule = feedback_and_rule(options)
    signal = resolve_signal(options.method, options.signal, options.link, options.mask_target)
    samples, types = len(data[0]), resolve_precision(options.precision, pick_device(options.device), options.method)
    windows = windows_of(options)
    rows = min(windows.size, samples) if windows is not None and windows.local else samples
    error_bytes, line = 0, "error store: none"
    if signal is not None and signal.delayed:
        codec = error_codec(options.error_dtype, data[0], types.working, options.error_rank, options.seed)
        home = pick_home(options.error_store, rows * codec.row_bytes, pick_device(options.device))
        error_bytes, line = 0 if is_folder(home) else rows * codec.row_bytes, store_line(home, rows, codec)
        if not options.overwrite and options.resume is None:
            check_home(home, rows, codec)
    batch, data_bytes = min(options.batch_size, samples), sum(d.nbytes for d in data)
    train_set, rank = data[0], options.error_rank
    if options.model == "mlp":
        budget = mlp_budget(
            network["sizes"], batch, rows, rule, signal, types, data_bytes, error_bytes=error_bytes, error_width=rank
        )
        budget.memory["feedback"] *= not network["feedback_shape"].endswith("generated")
    else:
        budget = network_budget(
            shapes, train_set.preprocessing.shape, rank or train_set.outputs, batch, rule, signal, types, data_bytes,
            error_bytes, train_set.positions, tokens=train_set.task == LANGUAGE_MODELING,
        )  # fmt: skip
    if rank is not None:
        entries = error_projection(train_set.outputs, rank, options.seed).numel()
        budget = replace(budget, flops=budget.flops + 2 * batch * train_set.positions * entries)
        budget.memory["feedback"] += entries * types.working.itemsize
    return budget, line


def store_line(home: str, samples: int, codec: Codec) -> str:
    needed = readable_bytes(samples * codec.row_bytes)
    each = f" ({codec.row_bytes // codec.positions:,} a token)" * (codec.positions > 1)
    return f"error store: {home}, {codec.word}, {samples:,} rows of {codec.row_bytes:,} bytes{each}, {needed}"


def train(options: argparse.Namespace, compare: bool) -> None:
    began = time.perf_counter()
    say = (lambda line: None) if options.quiet else lambda line: print(line, flush=True)
    feedback_and_rule(options)  # what needs no data is checked before it is read
    windows = windows_of(options)
    check_epochs(options.epochs, windows)
    check_seed(options.seed)
    pick_device(options.device)
    snapshot = checkpoint_to_resume(options)
    begun = begun_before(options) if snapshot is None else None
    overwrite = options.overwrite or begun is not None
    if options.output_dir and snapshot is None:
        RunFolder.check(options.output_dir, overwrite)
    every = None if options.checkpoint_every is None else parse_every(options.checkpoint_every)
    if every is None and options.keep != 2:
        raise f3.InputError("--keep has no effect without --checkpoint-every; leave it out")

    data = train_set, test_set = load_data(options)
    say(f"{train_set.name}: {len(train_set):,} training and {len(test_set):,} test samples")
    for line in train_set.preprocessing.describe():
        say(f"  {line}")

    if isinstance(train_set, StreamDataset):
        check_stream(train_set, windows)
        if options.diagnose is not None:
            raise f3.InputError("--diagnose looks at the same samples again and again, which a stream does not keep")
    network = network_of(options, train_set)
    if options.dry_run:
        budget, line = dry_budget(options, network, data)
        say("\n".join([*describe(budget), line]))
        steps = options.epochs * steps_per_epoch(len(train_set), options.batch_size, windows)
        say(f"steps {steps:,}, of {options.batch_size} sample visits each, in {options.epochs:,} epochs")
        return
    trainer = make_trainer(options, network, options.method, options.signal)
    trainer.check(train_set, test_set, options.epochs, options.eval_every)
    if train_set.task == LANGUAGE_MODELING:  # the sample after training must not fail
        f3.Predictor(trainer.model, train_set.preprocessing, "cross-entropy").first_tokens(*sample_settings(options))
    say(f"{title_of(network)}, {trainer.describe()}")
    store = trainer.store_for(train_set)
    if store is not None:
        say(store_line(*store))
        if is_folder(store[0]) and (options.overwrite or (begun or {}).get("error_store") == whole_path(store[0])):
            remove_store(store[0])
        if snapshot is None:
            check_home(*store)
    if snapshot is not None:
        require_same(snapshot, settings_of(trainer, identity(train_set), options.epochs, options.eval_every))
        say(f"going on after step {snapshot.state['steps']:,}, in epoch {snapshot.state['epoch'] + 1}")

    folder = RunFolder(options.output_dir or default_folder(options), overwrite, resume=snapshot is not None)
    checkpoints = None if every is None else Checkpoints(folder.checkpoints, *every, keep=options.keep)
    folder.require_space(trainer.model)
    config = {
        "format": FORMAT,
        "network": trainer.model.config(),
        "loss": resolve_loss(options.loss, train_set.task),
        "preprocessing": train_set.preprocessing.to_json(),
        "options": with_whole_paths(options) | {"resume": None, "overwrite": False},
        "command": shlex.join(["python", "train.py", *sys.argv[1:]]),
        "versions": versions(),
    }
    folder.write_json("config.json", config)
    if snapshot is None:
        folder.save_model(trainer.model)  # what is kept should the first epoch diverge
    else:
        folder.write_metrics(snapshot.state["history"])

    diagnostics = None if options.diagnose is None else Diagnostics(trainer, train_set, options.diagnose)

    def keep(record: Record) -> None:
        if diagnostics is not None:
            diagnostics(record)
        folder.append_metrics(record)
        folder.save_model(trainer.model)

    try:
        result = fit(trainer, options, data, keep, checkpoints, snapshot)
    except Diverged as error:
        result = trainer.result
        result.status = "diverged"
        finish(folder, trainer, data, result, began)
        kept = f"of epoch {result.history[-1]['epoch']}" if result.history else "from before the first epoch"
        raise f3.InputError(f"{error}; the model {kept} is kept in {folder.path}") from None
    other = None
    if compare and result.status == "completed":
        say("the same network by backpropagation:")
        other = make_trainer(options, network, "bp", None, in_windows=False)
        fit(other, options, data)
    summary = finish(folder, trainer, data, result, began, other)
    if diagnostics is not None:
        diagnostics.save(folder.path)
        for line in summary_lines(diagnostics):
            say(line)
    for line in report(summary, folder, train_set.preprocessing.target_names):
        say(line)
    if train_set.task == LANGUAGE_MODELING and not options.quiet:
        say(f"a sample:\n{sample_of(f3.Predictor(trainer.model, train_set.preprocessing, 'cross-entropy'), options)}")
    if result.status == "interrupted":
        raise KeyboardInterrupt


def finish(
    folder: RunFolder,
    trainer: Trainer,
    data: tuple[Dataset, Dataset],
    result: FitResult,
    began: float,
    other: Trainer | None = None,
) -> dict:
    """Write `summary.json` and `curves.png`; returns the summary."""
    summary = summarise(trainer, *data, result, time.perf_counter() - began)
    runs = {trainer.method: result.history}
    if other is not None:
        runs["bp"] = other.result.history
        against = summarise(other, *data, other.result, other.result.learning_seconds)
        wanted = ("method", *shown(against), "steps_per_second")
        summary["comparison"] = {key: against[key] for key in wanted if not key.startswith("train")}
    folder.write_json("summary.json", summary)
    figure, label = figure_of(data[0])
    curves = {
        f"{method}, {part}": [(r["epoch"], r[f"{part}_{figure}"]) for r in history if f"{part}_{figure}" in r]
        for method, history in runs.items()
        for part in ("train", "test")
    }
    title = f"{data[0].name}, {summary['parameters']:,} parameters"
    folder.draw(title, "epoch", label, {name: curve for name, curve in curves.items() if curve})
    return summary


def report(summary: dict, folder: RunFolder, targets: tuple[str, ...]) -> list[str]:
    """The result in words, the comparison if there was one, and what to try next."""
    other = summary.get("comparison")
    lines = []
    if summary.get("test_error") is not None:
        lines.append(f"{summary['method']}: {100 - summary['test_error']:.2f} % of the test samples right")
        if other:
            lines[-1] += f"; bp: {100 - other['test_error']:.2f} % (same network, seed, order and learning rate)"
    elif summary.get("test_mse") is not None:
        own = ", ".join(f"{name} {summary['test_mse_in_units'][name]:.4g}" for name in targets)
        lines.append(f"{summary['method']}: test MSE {summary['test_mse']:.4f} (in the target's own units: {own})")
        if other:
            lines[-1] += f"; bp: {other['test_mse']:.4f}"
    bits = next((key for key in summary if key.startswith("test_bits_per_")), None)
    if bits is not None:
        unit = bits.removeprefix("test_bits_per_")
        nats = f"{summary['test_loss']:.4f} nats, perplexity {summary['test_perplexity']:.2f}"
        lines.append(f"{summary['method']}: {summary[bits]:.4f} bits per {unit} of the test text ({nats})")
        if other:
            lines[-1] += f"; bp: {other[bits]:.4f} (same network, seed, order and learning rate)"
    if summary["steps_per_second"]:
        rates = {summary["method"]: summary, "bp": other} if other else {summary["method"]: summary}
        lines.append("; ".join(f"{name}: {run['steps_per_second']:,.0f} steps/s" for name, run in rates.items()))
    lines.append(f"written to {folder.path}: summary.json, metrics.jsonl, curves.png, model.safetensors, config.json")
    if other and bits is None:
        lines += [
            "next: python train.py --hidden 500 500 500     a deeper network",
            "      python train.py --method drtp --compare  another method; also dfa, sdfa, last-layer",
            "      python train.py --dataset ylecun/mnist   any Hugging Face data set, or your own folder or file",
        ]
    return lines


def with_whole_paths(options: argparse.Namespace) -> dict[str, object]:
    """The options as a dict, in which the names of local files and folders do not depend on where the run was started."""
    found = dict(vars(options))
    for name in ("dataset", "tokenizer", "text"):
        value = found[name]
        is_path = value is not None and Path(value).expanduser().exists() and not (name == "text" and options.dataset)
        if is_path and value not in ("digits", "characters", "bytes"):
            found[name] = whole_path(value)
    if is_folder(options.error_store):
        found["error_store"] = whole_path(options.error_store)
    return found


def whole_path(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def figure_of(data: Dataset) -> tuple[str, str]:
    """The figure that the curves show, by the end of its name, and its label."""
    if data.task == LANGUAGE_MODELING:
        unit = data.preprocessing.tokenizer.unit
        return f"bits_per_{unit}", f"bits per {unit}"
    return ("error", "percent wrong") if data.task == "classification" else ("mse", "mean squared error")


def default_folder(options: argparse.Namespace) -> str:
    source = options.dataset or Path(options.text).stem
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source).strip("-.") or "data"
    return f"runs/{name}-{options.method}-{time.strftime('%Y%m%d-%H%M%S')}"


# --- evaluation of a run ----------------------------------------------------------------------------------------------


def evaluate_run(options: argparse.Namespace, given: set[str]) -> None:
    """Repeat a run's last evaluation: its own data, model, device and batch size."""
    refused = sorted(given - {"--evaluate", "--device", "--quiet"})
    if refused:
        raise f3.InputError(f"--evaluate takes the run's own settings (only --device and --quiet go with it), got {refused[0]}")
    path = Path(options.evaluate).expanduser()
    config, summary = read_json(path, "config.json"), read_json(path, "summary.json")
    predictor = f3.load(path)
    stored = stored_options(config.get("options"))
    device = pick_device(options.device if "--device" in given else stored.device)
    _, test_set = load_data(stored)
    precision = stored.precision
    network = predictor.network.to(device)
    compute_dtype = resolve_precision(precision, device, stored.method).products
    with matmul_precision(precision):
        figures = evaluate(network, test_set.to(device), predictor.loss, stored.eval_batch_size, device, compute_dtype)
    found = test_record(test_set, figures)
    for name in shown(found):
        before = summary.get(name)
        note = "exactly as stored by the run" if found[name] == before else f"stored by the run: {before}"
        if not options.quiet:
            print(f"{name.replace('_', ' ')} {found[name]} ({note})")


def sample_run(options: argparse.Namespace, given: set[str]) -> None:
    """Write text from a run's model."""
    allowed = {"--sample", "--tokens", "--prompt", "--temperature", "--seed", "--device"}
    refused = sorted(given - allowed)
    if refused:
        raise f3.InputError(f"--sample goes with {', '.join(sorted(allowed - {'--sample'}))} only, got {refused[0]}")
    print(sample_of(f3.load(options.sample, pick_device(options.device)), options))


def sample_of(predictor: f3.Predictor, options: argparse.Namespace) -> str:
    """Text from a language model, the same for the same options."""
    return predictor.generate(*sample_settings(options), options.seed)


def sample_settings(options: argparse.Namespace) -> tuple[str | None, int, float]:
    """(prompt, tokens, temperature)."""
    tokens = SAMPLE_TOKENS if options.tokens is None else options.tokens
    return options.prompt, tokens, TEMPERATURE if options.temperature is None else options.temperature


def stored_options(options: object) -> argparse.Namespace:
    """A run's options as `config.json` has them, checked as if they had been typed."""
    if not isinstance(options, dict):
        raise f3.InputError("the run's config.json has no options")
    arguments = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            arguments.append(flag)
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)]
        elif value is not None and value is not False:
            arguments.append(f"{flag}={value}")
    return parse(arguments)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    given = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
    plain = not given - {"--quiet", "--output-dir", "--overwrite"}
    try:
        options = parse(arguments)
        if options.evaluate is not None:
            evaluate_run(options, given)
        elif options.sample is not None:
            sample_run(options, given)
        else:
            refuse_what_has_no_effect(options, given)
            train(options, plain if options.compare is None else options.compare)
    except f3.InputError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        print("train.py: error: not enough memory; --dry-run shows what it is needed for", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was evaluated and saved so far is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
