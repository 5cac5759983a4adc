"""The benchmark of the kernels runs, and finds every kernel right, at sizes that the interpreter can do."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU it is run by bench.gpu")
def test_every_operation_is_measured(tmp_path: Path) -> None:
    from bench import kernels

    kernels.main(["--dtype", "float16", "--output", str(tmp_path / "kernels.json")])
    content = json.loads((tmp_path / "kernels.json").read_text())
    assert content["wrong"] == []
    assert {row["part"].split(",")[0] for row in content["rows"]} == set(kernels.OPERATIONS)
    assert all(row["median"] > 0 for row in content["rows"])
    assert (tmp_path / "kernels.png").stat().st_size > 10_000
