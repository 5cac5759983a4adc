"""Who may import whom in the house, and what an import loads. Imports in functions and for type checkers count as well."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOWEST = {"base", "kernels"}
# A room, and the rooms (or single modules of theirs) that it may import beside itself.
MAY_IMPORT = {
    "base": {"kernels.words"},
    "kernels": set(),
    "network": LOWEST,
    "error_store": LOWEST,
    "data": LOWEST,
    "models": LOWEST | {"network", "data.targets"},
    "learn": LOWEST | {"network", "error_store.store"},
    "visits": {"base", "data"},
    "distributed": LOWEST | {"learn", "network"},
    "recipes": {"base", "data.sources"},
}
MAY_IMPORT["run"] = {*MAY_IMPORT}


def modules() -> dict[str, Path]:
    """The file of every module, by its name without `f3triton.`; the package itself has an empty one."""
    rooms = {ROOT / "f3triton": Path(), ROOT / "kernels": Path("kernels")}
    found = {room / path.relative_to(top): path for top, room in rooms.items() for path in top.rglob("*.py")}
    return {".".join(name.with_suffix("").parts).removesuffix("__init__").rstrip("."): path for name, path in found.items()}


MODULES = modules()


def imports(name: str, text: str) -> Iterator[str]:
    """The modules of ours that the module `name`, of the source `text`, imports anywhere in it."""
    package = f"f3triton.{name if MODULES[name].name == '__init__.py' else name.rpartition('.')[0]}".rstrip(".")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            parts = [f"{source}.{alias.name}" for alias in node.names]
            found = [part if part.removeprefix("f3triton.") in MODULES else source for part in parts]
        else:
            continue
        yield from (module.removeprefix("f3triton").lstrip(".") for module in found if module.split(".")[0] == "f3triton")


IMPORTS = {name: set(imports(name, path.read_text(encoding="utf-8"))) for name, path in MODULES.items()}


def allowed(name: str, other: str) -> bool:
    """Whether the module `name` may import the module `other`."""
    room = name.split(".")[0]
    return not room or any(f"{other}.".startswith(f"{may}.") for may in {room, *MAY_IMPORT[room]})


def test_no_arrow_goes_up() -> None:
    wrong = sorted(f"{name} -> {other}" for name in IMPORTS for other in IMPORTS[name] if not allowed(name, other))
    assert not wrong, "\n".join(wrong)


def test_no_circle() -> None:
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which shows the circle


def test_nothing_imports_the_script() -> None:
    for path in [*MODULES.values(), *(ROOT / "bench").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            assert "train" not in names, f"{path.name} imports train.py"


def test_the_rules_find_what_is_wrong() -> None:
    """Every way of writing an import is seen, in functions and for type checkers as well."""
    text = "if TYPE_CHECKING:\n from ..learn import step\ndef f():\n import f3triton.run.trainer\n from .. import visits"
    assert set(imports("data.load", text)) == {"learn.step", "run.trainer", "visits"}
    assert set(imports("data", "from .load import encode\nimport f3triton, torch")) == {"data.load", ""}
    assert not any(allowed("data.load", other) for other in ("", "learn.step", "models", "database"))
    assert allowed("models.build", "data.targets")
    assert not allowed("models.build", "data.targets_of")


# --- what an import loads ---------------------------------------------------------------------------------------------


def loaded_by(code: str, without: tuple[str, ...] = ()) -> set[str]:
    """The modules that are loaded once `code` has run in a Python of its own, in which `without` cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({without!r}))\n{code}\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


TRAIN = """
import torch, f3triton as f3
data = f3.Dataset.from_tensors(torch.randn(20, 4), torch.arange(20) % 3)
f3.Trainer(f3.models.MLP([4, 8, 3]), batch_size=5).fit(data, epochs=1)
"""


HELP = """
import runpy, sys
sys.argv[1:] = ["--help"]
try: runpy.run_path("train.py", run_name="__main__")
except SystemExit: pass
"""
WITHOUT_TORCH = """
import runpy, sys
sys.meta_path.insert(0, type("Finder", (), {"find_spec": staticmethod(lambda name, *_: no(name) if name == "torch" else None)}))
def no(name): raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.argv[1:] = []
runpy.run_path("train.py", run_name="__main__")
"""


def test_the_kernels_need_torch_and_triton_only() -> None:
    others = ("numpy", "einops", "datasets", "PIL", "safetensors", "tqdm", "matplotlib", "pyarrow", "pandas")
    found = {name for name in loaded_by("from f3triton.kernels import *", without=others) if name.startswith("f3triton.")}
    assert {name for name in found if not f"{name}.".startswith("f3triton.kernels.")} == set()
    assert "f3triton.kernels.reference" in found


def test_options_are_known_without_torch() -> None:
    """So `--help` is there at once, and also where nothing is installed yet; new words of options belong into `base.words`."""
    others = ("torch", "triton", "numpy", "einops", "datasets", "safetensors", "tqdm")
    assert "f3triton.run.options" in loaded_by(HELP, without=others)
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "train.py: error: needs PyTorch, which is not installed: pip install -c constraints.txt -e .\n"
    assert done.returncode == 2


def test_what_is_not_used_is_not_imported() -> None:
    assert not loaded_by(TRAIN) & {"datasets", "matplotlib", "pandas", "pyarrow"}


def test_training_needs_no_triton() -> None:
    assert "f3triton.run.trainer" in loaded_by(TRAIN, without=("triton",))


def test_every_name_is_where_the_package_says() -> None:
    """The imports that type checkers and editors read, the table of modules, and `__all__` say the same."""
    import f3triton as f3

    tree = ast.parse((ROOT / "f3triton" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {f".{node.module or ''}": tuple(alias.name for alias in node.names) for node in block.body}
    assert told.pop(".") == ("kernels", "models")
    assert told == f3._MODULES
    assert sorted([*(name for names in told.values() for name in names), "kernels", "models"]) == sorted(f3.__all__)
    assert set(f3.__all__) <= set(dir(f3))
    assert all(getattr(f3, name) is not None for name in f3.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = f3.nothing
