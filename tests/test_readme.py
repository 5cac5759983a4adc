"""The README's tables are those of the committed results, and its links lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def test_tables_are_those_of_the_results() -> None:
    from bench.report import README, filled

    text = README.read_text(encoding="utf-8")
    assert filled(text) == text, "run python -m bench.report"


def test_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
