"""Labelled moments of a commit, for tests that end the process there. Without a test, nothing happens."""

from __future__ import annotations

from collections.abc import Callable

# In the order in which an epoch of a store in a file meets them.
STORE_LABELS = (
    "store:begin",  # a file is about to become that of the epoch which begins
    "store:begun",  # its header is written
    "store:wrote",  # rows of a batch are written
    "store:commit",  # the epoch's end
    "store:carried",  # rows that had no visit are copied
    "store:data-synced",
    "store:manifest-written",  # under its temporary name
    "store:manifest-synced",
    "store:manifest-renamed",
    "store:folder-synced",
    "store:committed",  # the next epoch reads what this one wrote
    "store:release",  # older generations are about to leave the manifest, which is written as above
    "store:released",  # they are spare files
)

hook: Callable[[str], None] | None = None  # set by a test


def fault(label: str) -> None:
    """Tell the test's hook, if there is one, that the moment `label` (such as `store:data-synced`) has come."""
    if hook is not None:
        hook(label)
