"""This folder as a universal kernel of Hugging Face's Kernel Hub: for programs that do not have f3triton installed.

    python -m f3triton.kernels.package FOLDER

writes `FOLDER/build/torch-universal` in the hub's format (https://huggingface.co/docs/kernels/kernel-requirements): the
modules, which import each other relatively and otherwise torch and triton only, `metadata.json` with their digests, and a
folder of the kernel's name for older versions of the `kernels` library. Then, with `pip install kernels`,

    ops = kernels.get_local_kernel(Path("FOLDER")).library

and FOLDER is what one uploads. The kernel's id, which is also the namespace of its operators, comes from its files: two
versions can be loaded side by side. Exits with 2 where the folder has a build already.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
NAME, VERSION, LICENSE = "f3triton", 0, "Apache-2.0"  # version 0, by the hub's convention: its interface may still change
LEFT_OUT = ("package.py", "tune.py", "__pycache__")  # programs of their own
# For older versions of the library, which look in a folder of the kernel's name: the same module by another path.
OLDER = '''"""The kernel is one folder up."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location(f"{__name__}_kernel", Path(__file__).parents[1] / "__init__.py")
_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _module
_spec.loader.exec_module(_module)
globals().update({_name: getattr(_module, _name) for _name in _module.__all__})
'''
CARD = f"""---
library_name: kernels
license: {LICENSE.lower()}
---

The operations of f3triton: training without a backward pass, with the optimizer in the weight gradient's Triton kernel. On a
CPU they are torch's own. `help(kernel.library.linear_step_)` has formula, shapes and types of each.
"""


def write(folder: Path) -> Path:
    """The build in `folder`, whole or not at all; returns its path.

    Raises FileExistsError where there is one, and OSError where the folder cannot be written.
    """
    target = folder / "build" / "torch-universal"
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it, or choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as partial:
        build = Path(partial) / "build"
        shutil.copytree(HERE, build, ignore=shutil.ignore_patterns(*LEFT_OUT))
        (build / NAME).mkdir()
        (build / NAME / "__init__.py").write_text(OLDER, encoding="utf-8")
        found = {path.relative_to(build).as_posix(): path.read_bytes() for path in sorted(build.rglob("*.py"))}
        digests = {name: hashlib.sha256(content).digest() for name, content in found.items()}
        metadata = {
            "name": NAME,
            "id": f"_{NAME}_{hashlib.sha256(b''.join(digests.values())).hexdigest()[:10]}",
            "version": VERSION,
            "license": LICENSE,
            "python-depends": [],
            "backend": {"type": "cuda"},  # the hub knows no universal one; the library loads a universal build anywhere
            "digest": {"algorithm": "sha256", "files": {name: base64.b64encode(d).decode() for name, d in digests.items()}},
        }
        (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        build.rename(target)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        "f3triton.kernels.package", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="made where it does not exist")
    try:
        print(write(parser.parse_args().folder))
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
