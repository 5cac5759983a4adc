"""The command line of `train.py`: its options, their defaults from a recipe or an earlier run, and which have no effect.

Options that are settings of the training come from the fields of `Settings`; the others are of the data, the network, the run.
All are known without torch, which is imported by what looks at the values.
"""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from ..base.exceptions import InputError
from ..base.files import read_object
from ..base.schema import ANY_OBJECT, FINITE, FLAG, STRING, Either, Fields, Many, Schema, Whole, Word, check, maybe
from ..base.text import printable
from ..base.words import (
    BUFFER,
    DEFAULT_VISITS,
    EMBEDDINGS,
    FEEDBACK_AT,
    FEEDBACK_SHAPES,
    GRANULARITIES,
    KINDS,
    LANGUAGE_MODELING,
    LAWS,
    LAYERS,
    LOGS,
    OPTIONS,
    POOLS,
    STATISTICS,
    TEMPERATURE,
    TOKENS,
    TRANSFORMER_NORMS,
    WHICH,
)
from ..kernels.words import ACTIVATIONS
from ..recipes import read_recipe, read_toml, recipe_names, split_name
from .settings import Settings, count_or_word, number_or_word

TASKS = ("auto", "classification", "regression", LANGUAGE_MODELING)
# Options of one call, which a run's configuration and a file of options do not have.
HERE = {"resume", "overwrite", "evaluate", "sample", "predict", "exit", "config", "push_to_hub"}
EVERY, KEEP = "10min", 2  # checkpoints
WORKERS = ("pipeline", "pipeline_split", "pipeline_link", "data_parallel", "data_parallel_by")


class Parser(argparse.ArgumentParser):
    """One line and exit code 2 for a bad option, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"train.py: error: {printable(message)} (python train.py --help shows all options)\n")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to every option's help, but for those that say it themselves."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def layer_sizes(text: str) -> list[int]:
    """`500` as [500], `500x3` as [500, 500, 500]."""
    found = re.fullmatch(r"(-?\d+)(?:x(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of units, such as 500, or 500x3 for three layers of 500")
    if int(found[2] or 1) > LAYERS:
        raise argparse.ArgumentTypeError(f"{text!r} has more than {LAYERS} layers")
    return [int(found[1])] * int(found[2] or 1)


def utf8(typed: str) -> str:
    """What was typed, read as UTF-8 where the locale is a narrower one; paths stay as they are, for they are opened by it."""
    try:
        return os.fsencode(typed).decode()
    except UnicodeError:
        return typed


def make_parser() -> Parser:
    """All options, in groups."""
    parser = Parser(
        prog="train.py",
        usage="train.py [options]",
        description="Train a neural network with no backward pass (F3), or with one of its peers.",
        epilog="With no options: F3 on the bundled handwritten digits, and backpropagation beside it.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    groups = {name: parser.add_argument_group(name) for name in ("data", "model", "method", "training", "run", "text")}
    groups["training"].add_argument("--epochs", type=int, default=100, metavar="N", help="number of visits of every sample")
    for one in fields(Settings):
        _add_setting(groups[one.metadata["group"]], one)
    _add_data(groups["data"])
    _add_model(groups["model"])
    _add_feedback(groups["method"])
    _add_run(groups["run"])
    _add_text(groups["text"])
    return parser


def _add_setting(group: argparse._ArgumentGroup, one: Field) -> None:
    flag, known = f"--{one.name.replace('_', '-')}", one.metadata
    if one.default is False:
        group.add_argument(flag, action="store_true", help=known["help"])
        return
    parse = known["parse"] or (str if one.default is None else type(one.default))
    shown = {name: known[name] for name in ("choices", "metavar", "help")}
    group.add_argument(flag, type=parse, default=one.default, **shown)


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--recipe", metavar="NAME", help=f"an experiment of the paper, NAME or NAME/RUN: {', '.join(recipe_names())}")
    add("--dataset", metavar="NAME", help="hub name, folder, or parquet/csv/json file; default: digits, which is bundled")
    add("--dataset-config", metavar="NAME", help="configuration of a hub data set")
    add("--revision", metavar="NAME", help="revision of a hub data set")
    add("--train-split", metavar="NAME", help="split to train on; default: train")
    add("--test-split", metavar="NAME", help="split to test on; default: test, validation, or a part of the training split")
    add(
        "--test-fraction",
        type=float,
        metavar="F",
        help="size of the part of the training split to test on; default: 0.2, drawn by the seed; of a text the last 0.1",
    )
    targets = "column to predict (several, with commas, in regression); default: by type and name"
    add("--target", type=utf8, metavar="COLUMN", help=targets)
    add("--features", type=utf8, nargs="+", metavar="COLUMN", help="columns to predict from; default: all others")
    add("--image", type=utf8, metavar="COLUMN", help="column of images; default: by type")
    add("--image-size", type=int, metavar="N", help="resize all images to N x N pixels; default: they have one size")
    add(
        "--task",
        choices=TASKS,
        default="auto",
        help="what to learn; auto: language-modeling with --text, else by the target's type",
    )
    add("--text", metavar="FILE|COLUMN", help="learn to continue this text: a file, or a column of --dataset")
    add(
        "--tokenizer",
        metavar="KIND",
        help="tokens of a text: characters, bytes, or a tokenizer's JSON file; default: characters",
    )
    add("--context", type=int, metavar="N", help="number of tokens in a sample, a window of the text; default: 64")
    add(
        "--max-train-samples",
        type=int,
        metavar="N",
        help="train on N samples drawn by the seed (of a text, a stream: the first); default: all",
    )
    add("--max-test-samples", type=int, metavar="N", help="test on N samples, drawn likewise; default: all")
    add("--streaming", action="store_true", help="read the data as it comes, in windows, and never hold all of it")
    add("--shuffle-buffer", type=int, metavar="N", help=f"rows of a stream that are mixed with one another; default: {BUFFER}")
    add(
        "--statistics-rows",
        type=int,
        metavar="N",
        help=f"rows of a stream from which means, classes and so on are taken; default: {STATISTICS}",
    )


def _own(option: str) -> str:
    """An option's default by kind of network, for its help."""
    values = {kind: its[option] for kind, its in OPTIONS.items() if option in its}
    values = {kind: "4 dim" if value is None else value for kind, value in values.items()}  # of an MLP in a block
    plain = {kind: " ".join(map(str, value)) if isinstance(value, list) else str(value) for kind, value in values.items()}
    one = set(plain.values())
    return f"; default: {one.pop() if len(one) == 1 else ', '.join(f'{value} ({kind})' for kind, value in plain.items())}"


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", choices=KINDS, help="kind of network; default: mlp, with --text gpt")
    add("--activation", choices=ACTIVATIONS, help="activation of the hidden layers; default: tanh, gelu (gpt)")
    units = f"units of each hidden layer of an mlp or convnet, 500x3 for three of 500{_own('hidden')}"
    add("--hidden", type=layer_sizes, nargs="+", metavar="N", help=units)
    add("--channels", type=int, nargs="+", metavar="N", help=f"channels of each convolution of a convnet{_own('channels')}")
    add("--kernel-size", type=int, metavar="N", help=f"side of a convnet's kernels in pixels{_own('kernel_size')}")
    add("--depth", type=int, metavar="N", help=f"number of a transformer's blocks{_own('depth')}")
    add("--dim", type=int, metavar="N", help=f"number of features of a transformer's token{_own('dim')}")
    add("--heads", type=int, metavar="N", help=f"number of attention heads in a transformer's block{_own('heads')}")
    add("--head-dim", type=int, metavar="N", help="number of features of an attention head; default: dim / heads")
    add("--mlp-width", type=int, metavar="N", help=f"units of the hidden layer in a transformer's block{_own('mlp_width')}")
    dropped = f"share of attention weights and units that a transformer drops while it learns{_own('dropout')}"
    add("--dropout", type=float, metavar="P", help=dropped)
    norm = "normalisation in a vit's blocks, after an mlp's activations (layer or none), or a convnet's convolutions (batch)"
    words = tuple(dict.fromkeys([*TRANSFORMER_NORMS, "batch"]))
    add("--norm", choices=words, help=f"{norm}; default: layer (vit), none (mlp, convnet), layer (mlp with --method local)")
    add("--residual", action="store_true", default=None, help="add an mlp layer's input to its output, where sizes are equal")
    add("--tied", action="store_true", default=None, help="make the weight of a gpt's head its tokens' embedding too")
    add("--patch-size", type=int, metavar="N", help=f"side of a vit's patches in pixels{_own('patch_size')}")
    embedded = "how a vit embeds patches: by one layer from the whole image (joint), or by one that all share (patch)"
    add("--embedding", choices=EMBEDDINGS, help=f"{embedded}{_own('embedding')}")
    add("--position-embedding", action="store_true", default=None, help="add a learned vector to each token of a vit")
    add("--pool", choices=POOLS, help=f"what a vit's head sees of the tokens: all (flatten), or their mean{_own('pool')}")
    taught = "how a transformer's blocks learn: by exact gradients inside each (block), or each layer taught directly (layer)"
    add("--granularity", choices=GRANULARITIES, help=f"{taught}{_own('granularity')}")


def _add_feedback(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--feedback", default="trinomial", metavar="LAW", help=f"law of the feedback matrices: {', '.join(LAWS)}")
    add(
        "--feedback-values",
        type=float,
        nargs="+",
        metavar="V",
        help="entries for the laws discrete-uniform and cartesian-product; default: -1 0 1",
    )
    add(
        "--feedback-scale",
        type=number_or_word,
        default=1.0,
        metavar="S",
        help="factor on the feedback matrices: a number, ones, zeros or 1/C",
    )
    add(
        "--feedback-shape",
        choices=FEEDBACK_SHAPES,
        help="whether tokens or pixels have feedback columns of their own or share them, and whether these are stored or "
        "generated when they are needed; default: full, shared (gpt)",
    )
    outputs = f"where feedback meets a gpt's blocks: at their outputs as they are, or normalised{_own('feedback_at')}"
    add("--feedback-at", choices=FEEDBACK_AT, help=outputs)


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output-dir", metavar="FOLDER", help="where the run is written; default: runs/DATASET-METHOD-DATE-TIME")
    add(
        "--overwrite",
        action="store_true",
        help="write over a run in the output folder, as soon as the new one has something to show, and over its error store",
    )
    add("--config", metavar="FILE", help="options from a TOML file (docs/runs.md), or a run's config.json; others override it")
    often = f"save the whole run every N steps, N epochs (2e) or N minutes (10min), or never; default: {EVERY}"
    add("--checkpoint-every", metavar="N", help=often)
    add("--keep", type=int, default=KEEP, metavar="K", help="number of checkpoints that are kept")
    add("--resume", metavar="WHERE", help="go on with a run: its folder; or auto: that of --output-dir, if it has begun")
    add(
        "--keep-best",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the model with the best test figure in best.safetensors, which f3.load takes; where the test split is also "
        "what you report, that picks by it: the figures of summary.json are those of the last epoch",
    )
    begin = "begin with the weights of that run's model, and its network's options but for those given"
    add("--init-from", metavar="FOLDER", help=f"{begin}; a last layer of other sizes is new")
    add("--eval-every", type=int, default=1, metavar="N", help="number of epochs from one evaluation to the next")
    add(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="train the same network by backpropagation too; default: only where no option is given",
    )
    add(
        "--diagnose",
        type=int,
        nargs="?",
        const=512,
        metavar="N",
        help="compare updates with true gradients, on N samples (without N: 512)",
    )
    add("--log", choices=LOGS, help="write the records of the run for TensorBoard too, to its folder")
    add("--push-to-hub", metavar="OWNER/NAME", help="put the model on the Hugging Face hub after training")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--dry-run", action="store_true", help="print shapes, FLOPs and the memory budget, and stop")
    add(
        "--predict",
        nargs=2,
        metavar=("FOLDER", "FILE"),
        help="write predictions for a file's rows, or an image, as CSV, and stop",
    )
    add("--evaluate", metavar="FOLDER", help="evaluate the model in a run's folder on its test data, and stop")
    add(
        "--exit",
        metavar="K",
        help="with --evaluate, of a run by --method local: let stage K answer, from 1, or the mean of all",
    )
    add(
        "--which", choices=WHICH, help="model that --evaluate, --sample and --init-from take; default: best, where there is one"
    )
    add("--drop-heads", action="store_true", help="do not keep the heads of hidden stages (--method local) in the model file")


def _add_text(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--sample", metavar="FOLDER", help="write text from the language model in a run's folder, and stop")
    add("--tokens", type=int, metavar="N", help=f"number of tokens of a sample, also of that after training; default: {TOKENS}")
    add("--prompt", type=utf8, metavar="TEXT", help="what a sample begins with; default: a line break")
    add(
        "--temperature",
        type=float,
        metavar="T",
        help=f"temperature of a sample's draws; 0: always the likeliest token; default: {TEMPERATURE}",
    )


def look_over(arguments: list[str]) -> None:
    """Answer `--help`, and end with a line for wrong options."""
    make_parser().parse_args(without_seeds(arguments))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; those of a recipe, or of the run that is resumed, are defaults, which others override."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.streaming:  # one pass over the stream
        parser.set_defaults(window="auto", epochs=options.visits or DEFAULT_VISITS)
        options = parser.parse_args(arguments)
    if options.config is not None:
        if options.recipe is not None or options.resume is not None:
            raise InputError(
                f"--config and --{'recipe' if options.resume is None else 'resume'} cannot go together; leave one out"
            )
        parser.set_defaults(**read_options(Path(options.config).expanduser()))
        options = parser.parse_args(arguments)
    if options.recipe is not None:
        name, run = split_name(options.recipe)
        parser.set_defaults(dataset=None, **read_recipe(name).options_of(run))
        options = parser.parse_args(arguments)
        options.dataset = options.dataset or read_recipe(name).data.get("dataset")
    if options.resume not in (None, "auto"):
        from .folder import read_json

        stored = vars(from_json(read_json(Path(options.resume).expanduser(), "config.json").get("options")))
        here = {name: parser.get_default(name) for name in WORKERS}  # any number of them may go on
        parser.set_defaults(**stored | here | {"resume": options.resume, "output_dir": options.resume})
        options = parser.parse_args(arguments)
    if options.init_from is not None and options.resume in (None, "auto"):
        for name, value in shape_in(Path(options.init_from).expanduser(), options.model).items():
            if getattr(options, name) is None and (name != "context" or options.text is not None):
                setattr(options, name, value)
    options.config = None  # all that it says is in the others now
    if options.text is None and options.dataset is None and options.recipe is None:
        options.dataset = "digits"
    if options.model is None:
        options.model = "mlp" if options.text is None else "gpt"
    if options.hidden is not None:
        layers = [size if isinstance(size, list) else layer_sizes(str(size)) for size in options.hidden]
        options.hidden = [size for layer in layers for size in layer]
    return options


def seeds_in(arguments: list[str]) -> list[str]:
    """The seeds of `--seed 0 1 2`; none where there is one at most."""
    if arguments.count("--seed") != 1:
        return []
    found = arguments[arguments.index("--seed") + 1 :]
    count = next((n for n, text in enumerate(found) if not text.isdecimal()), len(found))
    return found[:count] if count > 1 else []


def without_seeds(arguments: list[str]) -> list[str]:
    """The arguments without those seeds: what each of them is trained with."""
    count, first = len(seeds_in(arguments)), arguments.index("--seed") if "--seed" in arguments else 0
    return arguments[:first] + arguments[first + 1 + count :] if count else arguments


def shape_in(run: Path, model: str | None) -> dict[str, object]:
    """The options that say the shape of a run's network, as it was built, unless another kind of `model` is wanted."""
    from .folder import read_config

    network = read_config(run)["network"]
    if model not in (None, network["model"]):
        return {}
    other = {"hidden": network.get("sizes", [])[1:-1], "position_embedding": network.get("positions"), "norm": "none"}
    its, names = other | network, {"model", "activation", "context", *OPTIONS[network["model"]]}
    return {name: its[name] for name in names & its.keys() - {"feedback_shape", "feedback_at"}}


def given(arguments: list[str]) -> set[str]:
    """The options that were typed, such as `--lr`."""
    return {argument.split("=")[0] for argument in arguments if argument.startswith("--")}


def given_in_file(arguments: list[str]) -> set[str]:
    """The options that a `--config` file says, in the same form; of a run's, which says all, those that are not the default."""
    file = make_parser().parse_args(arguments).config
    if file is None:
        return set()
    path, plain = Path(file).expanduser(), vars(make_parser().parse_args([]))
    said = {name: value for name, value in read_options(path).items() if path.suffix != ".json" or value != plain[name]}
    return {f"--{name.replace('_', '-')}" for name, value in said.items() if value not in (None, False)}


def make_settings(options: argparse.Namespace) -> Settings:
    """The settings of the training. Raises InputError where they do not fit one another."""
    return Settings(**{one.name: getattr(options, one.name) for one in fields(Settings)})


def refuse_what_has_no_effect(options: argparse.Namespace, typed: set[str]) -> None:
    """An option that the method or the data does not use, of those `typed`, is an error, not a silent nothing."""
    from ..learn.signal import resolve_signal

    signal = resolve_signal(options.method, options.signal)
    feedback = {"--feedback", "--feedback-values", "--feedback-scale", "--feedback-shape", "--feedback-at"}
    idle = {"--hidden-scale", "--link", "--mask-target", "--error-rank", *feedback}
    if signal is not None and signal.source != "none":
        idle = {"--link"} if signal.source == "target" else set()
    if signal is not None and signal.local and options.local_feedback == "head":
        idle |= feedback
    if signal is None or not signal.delayed:
        idle |= {"--error-store", "--error-dtype"}
    if signal is None or not signal.local:
        idle |= {"--drop-heads"}
    for option in sorted(idle & typed):
        taught = f"the method {options.method!r}" if signal is None else f"the signal {signal.source!r}"
        raise InputError(f"{option} has no effect with {taught}; leave it out, or choose another --method or --signal")
    if options.exit is not None:
        raise InputError("--exit has no effect without --evaluate; leave it out")
    if options.init_from is None:
        _refuse(options, ("which",), "without --evaluate, --sample or --init-from; leave it out")
    if options.resume is not None and "--init-from" in typed:
        raise InputError("--init-from and --resume cannot go together: a run that goes on has weights; leave one out")
    if options.checkpoint_every == "never" and options.keep != KEEP:
        raise InputError("--keep has no effect with --checkpoint-every never; leave it out")
    if not options.streaming:
        _refuse(options, ("shuffle_buffer", "statistics_rows"), "without --streaming; leave it out")
    if options.text is not None:
        if options.task not in ("auto", LANGUAGE_MODELING):
            raise InputError(f"--text is for the task {LANGUAGE_MODELING!r}, got --task {options.task}")
        _refuse(options, ("target", "features", "image", "image_size", "streaming"), "with --text; leave it out")
    else:
        if options.task == LANGUAGE_MODELING:
            raise InputError(f"task {LANGUAGE_MODELING!r} needs a text: --text FILE, or --text COLUMN with --dataset")
        _refuse(options, ("tokenizer", "context", "tokens", "prompt", "temperature"), "without --text")
    if options.pipeline != "off" or options.data_parallel > 1:
        _refuse(options, ("diagnose", "compare"), "with several workers; leave it out")
    if options.streaming and options.diagnose is not None:
        raise InputError("--diagnose looks at the same samples again and again, which a stream does not keep")


def _refuse(options: argparse.Namespace, names: tuple[str, ...], where: str) -> None:
    for name in names:
        if getattr(options, name) not in (None, False):
            raise InputError(f"--{name.replace('_', '-')} has no effect {where}")


# --- the options in a run's `config.json` -----------------------------------------------------------------------------


def to_json(options: argparse.Namespace) -> dict[str, object]:
    """The options of a run, in which the names of local files and folders do not depend on where the run was started."""
    from ..error_store import is_folder

    found = dict(vars(options)) | {"resume": None, "overwrite": False}
    for name in ("dataset", "tokenizer", "text", "init_from"):
        value = found[name]
        is_path = value is not None and Path(value).expanduser().exists() and not (name == "text" and options.dataset)
        if is_path and value not in ("digits", "characters", "bytes"):
            found[name] = whole_path(value)
    if is_folder(options.error_store):
        found["error_store"] = whole_path(options.error_store)
    return found


def read_options(path: Path) -> dict[str, object]:
    """The options in a file: a run's `config.json`, or TOML in the form of a recipe, the table `options` and perhaps `data`,
    with the name of the data set. Raises InputError for anything else in it.

    Of a run's all but its folder are taken.
    """
    if path.suffix == ".json":
        return vars(from_json(read_object(path).get("options"))) | {"output_dir": None}
    content = read_toml(path)
    form = {"title": STRING, "source": STRING, "note": STRING, "data": ANY_OBJECT, "options": ANY_OBJECT}
    for name, value in content.items():
        if name not in form:
            what = f"[{name}]" if isinstance(value, dict) else name
            raise InputError(
                f"{str(path)!r}: {what} is not below [options], where all options belong; allowed: {', '.join(form)}"
            )
    check(Fields({}, form), content, f"{str(path)!r}: it")
    if others := sorted(content.get("data", {}).keys() - {"dataset"}):
        raise InputError(f"{str(path)!r}: [data] holds {others[0]}; allowed: dataset; all other options belong below [options]")
    found = {**content.get("data", {}), **content.get("options", {})}
    if others := sorted(found.keys() & HERE):
        raise InputError(f"{str(path)!r}: {others[0]} is for the command line only")
    known = stored_options().may
    if others := [name for name in found if name not in known]:
        meant = get_close_matches(others[0].replace("-", "_"), known, 1)
        hint = f"did you mean {meant[0]}?" if meant else "names are those of --help, with underscores"
        raise InputError(f"{str(path)!r}: [options] holds {others[0]!r}, which is no option; {hint}")
    check(stored_options(), found, f"{str(path)!r}: options")
    return found


def whole_path(path: str) -> str:
    """A path that is the same from everywhere."""
    return str(Path(path).expanduser().resolve())


def from_json(stored: object) -> argparse.Namespace:
    """A run's options. Raises InputError where they are not a run's."""
    check(stored_options(), stored, "the run's options in config.json: it")
    plain = vars(make_parser().parse_args([]))
    return argparse.Namespace(**plain | stored | {name: plain[name] for name in HERE})


def stored_options() -> Fields:
    """What the options in a file may be."""
    return Fields({}, {action.dest: _schema_of(action) for action in make_parser()._actions if action.dest != "help"})


def _schema_of(action: argparse.Action) -> Schema:
    """What an option's value may be."""
    whole = Whole(-(1 << 63), 1 << 63)
    parsed = {int: whole, float: FINITE, layer_sizes: whole, count_or_word: Either((whole, STRING))}
    one = {**parsed, number_or_word: Either((FINITE, STRING))}.get(action.type, STRING)
    if action.choices is not None:
        one = Word(tuple(action.choices))
    if action.nargs == "+":
        one = Many(one, 1)
    if action.nargs == 0:
        one = FLAG
    return maybe(one) if action.default is None else one
