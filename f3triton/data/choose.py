"""Which columns are inputs and which are targets, by their names and types."""

from __future__ import annotations

from collections.abc import Sequence

from ..base.exceptions import InputError
from .columns import IMAGE, PIXELS, UNUSABLE, VECTOR, Table, is_numeric, is_text, kind_of, listed

TARGET_NAMES = ("label", "labels", "target", "targets", "y", "class")  # looked for in this order, in any case
ROW_NUMBER_NAMES = ("id", "idx", "index")  # integer columns of these names, all values distinct, are no features


def choose_target(rows: Table, target: str | Sequence[str] | None) -> list[str]:
    """The target column, or columns.

    Where none is named: the only ClassLabel column (of several, the one with a usual name); else a column with a usual
    name (label, labels, target, targets, y, class); else the only column that is left beside an image, or beside one
    other column, where it is the last. Anything else is an InputError that lists the columns.
    """
    if target is not None:
        names = split_names(target, rows)
        if not names:
            raise InputError(f"target (--target) names no column; columns: {listed(rows.names)}")
        for name in names:
            rows.require(name)
        return names
    labels = list(rows.class_names)
    if len(labels) == 1:
        return labels
    by_name = {name.lower(): name for name in reversed(labels or rows.names)}
    for usual in TARGET_NAMES:
        if usual in by_name:
            return [by_name[usual]]
    if not labels:
        if len(rows.names) == 2:
            images = [name for name in rows.names if kind_of(rows, name)[0] in (IMAGE, PIXELS, VECTOR)]
            others = [name for name in rows.names if name not in images]
            return others if len(others) == 1 else rows.names[-1:]
        others = [name for name in rows.names if kind_of(rows, name)[0] != IMAGE]
        if len(others) == 1:
            return others
    if all(kind_of(rows, name)[0] == IMAGE for name in rows.names):
        raise InputError(
            f"{rows.where} holds images and no classes; a folder of images needs a folder for each class, two or more"
        )
    reason = f"several columns hold class labels ({listed(labels)})" if labels else "no column has a usual name for a target"
    raise InputError(f"{reason}; name the target with target (--target); columns: {listed(rows.names)}")


def choose_inputs(
    rows: Table, targets: list[str], features: str | Sequence[str] | None, image: str | None
) -> tuple[str | None, dict[str, str], list[str]]:
    """(image column, or None for a table; table columns with their kinds; notes on the columns left out)."""
    named = None if features is None else split_names(features, rows)
    for name in named or []:
        rows.require(name)
        if name in targets:
            raise InputError(f"column {name!r} is the target and cannot be a feature as well")
    if named is not None and not named:
        raise InputError(f"features (--features) names no column; columns: {listed(rows.names)}")
    candidates = named or [name for name in rows.names if name not in targets]
    if image is not None:
        rows.require(image)
        if image in targets:
            raise InputError(f"column {image!r} is the target and cannot be the image as well")
        if named is not None and named != [image]:
            raise InputError(
                f"features {listed(named)} cannot be used beside the image column {image!r}; give one or the other"
            )
        if not _image_like(rows, image):
            reason = kind_of(rows, image)[1]
            raise InputError(f"column {image!r} holds no images but {rows.type(image)}{f' ({reason})' if reason else ''}")
        return image, {}, _ignored(candidates, image)
    kinds = {name: kind_of(rows, name) for name in candidates}
    images = [name for name in candidates if kinds[name][0] == IMAGE]
    if not images and (named is None or len(named) == 1):
        images = [name for name in candidates if kinds[name][0] == PIXELS]
    if len(images) > 1:
        raise InputError(f"several columns hold images; name one with image (--image): {listed(images)}")
    if images:
        if named is not None and len(named) > 1:
            raise InputError(f"image column {images[0]!r} cannot be used beside other features; name it alone")
        return images[0], {}, _ignored(candidates, images[0])
    table: dict[str, str] = {}
    left_out = {}
    for name, (kind, reason) in kinds.items():
        if named is None and not reason and _row_numbers(rows, name):
            kind, reason = UNUSABLE, "row numbers"
        if kind == UNUSABLE:
            left_out[name] = reason
        else:
            table[name] = VECTOR if kind == PIXELS else kind
    return None, table, reject(left_out, named is not None, rows)


def reject(left_out: dict[str, str], named: bool, rows: Table) -> list[str]:
    """Notes on columns left out, with the reasons; InputError if the user asked for them by name."""
    for name, reason in left_out.items() if named else ():
        raise InputError(f"column {name!r} of {rows.where} cannot be a feature: {reason}")
    return [f"left out: column {name!r} ({reason})" for name, reason in left_out.items()]


def split_names(names: str | Sequence[str], rows: Table) -> list[str]:
    """Column names from a list of them, or from one string, separated by commas (unless a column has that very name)."""
    given = [names] if isinstance(names, str) else list(names)
    out = []
    for name in given:
        out += [name] if name in rows.names else [part.strip() for part in name.split(",") if part.strip()]
    return list(dict.fromkeys(out))


def _image_like(rows: Table, name: str) -> bool:
    import pyarrow as pa

    kind = rows.type(name)
    paths = is_text(kind) and name not in rows.class_names
    return paths or kind_of(rows, name)[0] in (IMAGE, PIXELS) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _ignored(candidates: list[str], image: str) -> list[str]:
    return [f"left out: column {name!r} (beside an image)" for name in candidates if name != image]


def _row_numbers(rows: Table, name: str) -> bool:
    """Whether a column only numbers the rows: pandas' index written to a file, or integers called id, all distinct."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if name.startswith(("Unnamed: ", "__index_level_")):
        return is_numeric(rows.type(name))
    if name.lower() not in ROW_NUMBER_NAMES or not pa.types.is_integer(rows.type(name)):
        return False
    column = rows.column(name)
    return pc.count_distinct(column).as_py() == len(column)
