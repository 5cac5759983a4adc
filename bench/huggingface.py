"""Memory of training a model of the transformers library: by the stages of docs/models.md, and by plain fine-tuning.

    pip install transformers
    python -m bench.huggingface

The example of that page with other sizes: a Llama of 12 layers of 512 features, 38 million parameters, on batches of 16 texts
of 256 tokens in float32, Adam, random weights. `fine-tuning` is the same model by `loss.backward()` and torch's fused Adam.
Every method has a process of its own, with one thread, and makes two steps. `peak`: the most resident memory over what there
was before the model (Linux); `saved`: the most that autograd kept at one time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import torch

from f3triton.base.data import Visit

from .common import RESULTS, result, row, save, table
from .memory_child import SavedTensors, figures_of, peak, reset_peak

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
METHODS = ("f3", "local", "fine-tuning")
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8, "context": 256}
QUICK = {"hidden_size": 64, "num_hidden_layers": 2, "context": 32}
MIB = 2**20


def example(until: str | None = None, **sizes: object) -> dict[str, object]:
    """The names that the page's example leaves, with other sizes in it; run up to the line that begins with `until`."""
    blocks = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    code = next(block for block in blocks if "transformers" in block)
    for name, value in sizes.items():
        code = re.sub(rf"\b{name}=[^,)]+", f"{name}={value!r}", code)
    if until is not None:
        code = code[: code.index(f"\n{until}")]
    names: dict[str, object] = {"__name__": "example"}
    torch.manual_seed(0)
    exec(compile(code, PAGE.name, "exec"), names)
    return names


def measure(method: str, sizes: dict[str, int], batch: int) -> dict[str, int]:
    """Bytes: `peak` and `saved`; and `parameters`."""
    torch.set_num_threads(1)
    small = {**QUICK, "max_train_samples": batch, "max_test_samples": 1, "epochs": 1, "batch_size": batch}
    example(method="f3", **small)  # loads what the libraries have
    before = reset_peak(torch.device("cpu"))
    own = {**small, **sizes}
    if method == "fine-tuning":
        names = example("stages = ", **own)
        model, x = names["model"].train(), names["train"].inputs[:batch].long()
        optimizer = torch.optim.Adam(model.parameters(), fused=True)

        def step() -> None:
            model(input_ids=x, labels=x).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()
    else:
        names = example(method=method, **own)
        model, everything = names["model"], torch.arange(batch)
        step = lambda: names["trainer"].learner.visit(Visit(everything, everything), 1e-4)  # noqa: E731
    step()
    highest, count = peak(torch.device("cpu")), SavedTensors(model)
    with torch.autograd.graph.saved_tensors_hooks(count.pack, count.unpack):
        step()
    return {"peak": highest - before, "saved": count.most, "parameters": sum(p.numel() for p in model.parameters())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers of 64 features")
    parser.add_argument("--output", type=Path, default=RESULTS / "huggingface.json")
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if importlib.util.find_spec("transformers") is None:
        sys.exit("bench.huggingface needs transformers: pip install transformers")
    sizes, batch = ({}, 4) if options.quick else (SIZES, 16)
    if options.child:
        print(json.dumps(measure(options.child, sizes, batch)))
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    quick = ["--quick"] * options.quick
    found = {method: figures_of("bench.huggingface", "--child", method, *quick) for method in METHODS}
    rows = [
        row(method, word, "MiB", figures[word] / MIB, part=shown, parameters=figures["parameters"])
        for word, shown in (("peak", "peak over what there was before"), ("saved", "kept by autograd at one time"))
        for method, figures in found.items()
    ]
    print(
        table(
            ["", "peak, MiB", "saved, MiB"],
            [[m, f"{f['peak'] / MIB:.0f}", f"{f['saved'] / MIB:.0f}"] for m, f in found.items()],
        )
    )
    save(
        options.output, result("huggingface", rows, {"threads": 1, "batch": batch, **SIZES, **(QUICK if options.quick else {})})
    )


if __name__ == "__main__":
    main()
