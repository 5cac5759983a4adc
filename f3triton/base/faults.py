"""Labelled moments of a commit, for tests that end the process there. Without a test, nothing happens."""

from __future__ import annotations

from collections.abc import Callable

hook: Callable[[str], None] | None = None  # set by a test


def fault(label: str) -> None:
    """Tell the test's hook, if there is one, that the moment `label` (such as `store:data-synced`) has come."""
    if hook is not None:
        hook(label)
