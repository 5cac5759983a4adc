"""The pins: what the README's commands install resolves with either build of torch, and is what the documents say.

pip's own resolver is asked, by dry runs that read metadata and download nothing large; skipped where there is no package index.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.tritons import SUPPORTED  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXTRAS = PROJECT["optional-dependencies"]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
THIS = f"{sys.version_info[0]}.{sys.version_info[1]}"
Pip = Callable[..., "dict[str, dict] | str"]


def requirements(lines: list[str], python: str) -> list[Requirement]:
    """Those that apply to Linux and a version of Python; a pin without its marker."""
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    environment = {"python_version": python, "platform_system": "Linux"}
    found = [requirement for requirement in found if requirement.marker is None or requirement.marker.evaluate(environment)]
    for requirement in found:
        requirement.marker = None
    return found


def pins(name: str, python: str) -> dict[str, str]:
    lines = requirements((ROOT / name).read_text(encoding="utf-8").splitlines(), python)
    found = {pin.name: next(iter(pin.specifier)).version for pin in lines}
    assert len(found) == len(lines), f"{name} has two pins of a package for Python {python}"
    return found


@pytest.fixture(scope="module")
def pip(tmp_path_factory: pytest.TempPathFactory) -> Pip:
    """Runs `pip install --dry-run`; gives the metadata of what would be installed, by name, or why nothing would."""
    folder = tmp_path_factory.mktemp("pip")
    quick = ["--disable-pip-version-check", "--quiet", "--retries", "0", "--timeout", "30"]
    # One that reads the metadata of a wheel without downloading it (23.3 or newer).
    command = [sys.executable, "-m", "pip", "install", *quick, "--target", str(folder / "pip"), "pip>=24"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"there is no package index: {done.stderr.strip().splitlines()[-1]}")

    def run(*arguments: str) -> dict[str, dict] | str:
        report = folder / "report.json"
        command = [sys.executable, str(folder / "pip" / "pip"), "install", *quick, "--use-feature=fast-deps", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr[-2000:])
        found = [part["metadata"] for part in json.loads(report.read_text(encoding="utf-8"))["install"]]
        return {part["name"].lower().replace("_", "-"): part for part in found}

    return run


def required_triton(torch: dict) -> Requirement:
    """What an ordinary build of torch for Linux requires."""
    (found,) = (r for r in map(Requirement, torch["requires_dist"]) if r.name == "triton")
    return found


def resolve(pip: Pip, python: str, folder: Path) -> None:
    """What the README's commands would install under a version of Python, with torch's ordinary build."""
    pinned = pins("constraints.txt", python)
    constraints = folder / "constraints.txt"  # `===` leaves no room for the CPU build, 2.13.0+cpu
    constraints.write_text("".join(f"{name}{'===' if name == 'torch' else '=='}{pin}\n" for name, pin in pinned.items()))
    wanted = requirements(PROJECT["dependencies"] + EXTRAS["test"] + EXTRAS["bench"], python)
    # Of a dependency's own markers, pip evaluates those for the Python that it runs on.
    other = [] if python == THIS else ["--python-version", python, "--only-binary", ":all:", "--target", str(folder / "none")]
    found = pip("-c", str(constraints), *other, *map(str, wanted))
    assert isinstance(found, dict), found
    assert found["torch"]["version"] == pinned["torch"]
    assert found["triton"]["version"] == pinned["triton"]
    assert pinned["triton"] in required_triton(found["torch"]).specifier
    assert not [name for name, part in found.items() if part["version"] != pinned.get(name, part["version"])]


def test_the_commands_resolve_with_the_ordinary_build_of_torch(pip: Pip, tmp_path: Path) -> None:
    resolve(pip, THIS, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("python", [python for python in PYTHONS if python != THIS])
def test_the_commands_resolve_under_every_python(pip: Pip, tmp_path: Path, python: str) -> None:
    resolve(pip, python, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("triton", "torch"), [(triton, torch) for triton, all_ in SUPPORTED.items() for torch in all_])
def test_the_table_of_versions_is_what_torch_requires(pip: Pip, triton: str, torch: str) -> None:
    found = pip("--no-deps", f"torch==={torch}")
    if isinstance(found, str):
        pytest.skip(f"pip does not offer torch {torch} here: {found}")
    assert triton in required_triton(found["torch"]).specifier


def test_the_pins_are_what_is_supported() -> None:
    for python in PYTHONS:
        pinned = pins("constraints.txt", python)
        assert pinned["torch"] in SUPPORTED[pinned["triton"]]
        for requirement in requirements([*PROJECT["dependencies"], *EXTRAS["test"]], python):
            assert pinned[requirement.name] in requirement.specifier, requirement
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


def test_the_lowest_versions_are_those_of_the_project() -> None:
    lowest = pins("constraints-lowest.txt", PYTHONS[0])
    for requirement in requirements([*PROJECT["dependencies"], *EXTRAS["test"]], PYTHONS[0]):
        bounds = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        assert [Version(bound) for bound in bounds] == ([Version(lowest[requirement.name])] if bounds else []), requirement
        assert bounds or requirement.name == "ruff"  # a tool for the code's own form
    assert lowest["torch"] == SUPPORTED[lowest["triton"]][0]
    assert lowest["triton"] == next(iter(SUPPORTED))


def test_the_readme_says_which_versions() -> None:
    rows = re.findall(r"^\| (\d[\d., ]*) \| (\d+\.\d+\.\d+) \|", README, re.MULTILINE)
    assert {triton: tuple(torch.split(", ")) for torch, triton in rows} == SUPPORTED
    first, second = re.findall(r"```sh\n(pip install .*?)\n```", README)[:2]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert first == "pip install -c constraints.txt -e . && python train.py"
    assert first in script
    assert second in script
