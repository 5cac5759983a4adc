"""The README's tables are those of the committed results, and its links lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path

import f3triton as f3

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def test_tables_are_those_of_the_results() -> None:
    from bench.report import BLOCK, documents, filled

    assert BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))
    for path in documents():
        assert filled(path) == path.read_text(encoding="utf-8"), f"{path.name}: run python -m bench.report"


def test_the_sentences_hold_in_the_results() -> None:
    from bench.claims import good, not_good

    assert not [claim for claim in good() + not_good() if not claim.holds]


def test_links_lead_somewhere() -> None:
    from bench.report import documents

    for path in documents():
        text = path.read_text(encoding="utf-8")
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
        assert not [link for link in links if not (path.parent / link).exists()], path.name


def test_every_result_has_the_one_form() -> None:
    from bench.common import RESULTS, read_result

    for path in sorted(RESULTS.glob("*.json")):
        content = read_result(path.name)
        needed = {"benchmark", "command", "date", "processor", "device", "versions", "settings", "rows"}
        assert needed <= content.keys(), path.name
        for row in content["rows"]:
            assert {"part", "method", "x", "x_name", "metric", "median", "p20", "p80", "n"} <= row.keys(), path.name
            assert row["p20"] <= row["median"] <= row["p80"], path.name


def test_what_the_examples_import_is_there() -> None:
    from bench.report import documents

    for path in documents():
        for example in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            for node in ast.walk(ast.parse(example)):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("f3triton"):
                    if not node.module.endswith("gpu") or importlib.util.find_spec("triton"):
                        exec(compile(ast.Module([node], []), path.name, "exec"), {})
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "f3":
                    assert hasattr(f3, node.attr), f"{path.name}: no f3.{node.attr}"
