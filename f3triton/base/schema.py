"""What a file from elsewhere must hold, as one object: checked whole before anything in it is used, and drawn from in tests.

A schema is `STRING`, `FLAG`, `NUMBER`, `FINITE`, `ANYTHING`, or one of the classes below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .exceptions import InputError
from .text import short

LARGEST = 1 << 40  # of any number of things


class Schema:
    """`wrong` yields what does not fit: the place below the value, the value there, and what is allowed in its place."""

    def wrong(self, value: object) -> Iterator[tuple[str, object, str]]:
        raise NotImplementedError


@dataclass(frozen=True)
class Plain(Schema):
    """A value of a type of JSON's; a whole number is a number too, and true and false are none."""

    kind: type
    name: str
    finite: bool = False  # and of a magnitude that can be added up

    def wrong(self, value: object) -> Iterator[tuple[str, object, str]]:
        kinds = (int, float) if self.kind is float else self.kind
        fits = isinstance(value, kinds) and (self.kind is bool or not isinstance(value, bool))
        if not fits or (self.finite and not abs(value) < 1e308):
            yield "", value, self.name


@dataclass(frozen=True)
class Anything(Schema):
    """Whatever there is: what reads it has to check it."""

    def wrong(self, value: object) -> Iterator[tuple[str, object, str]]:
        return iter(())


STRING, FLAG, NUMBER, ANYTHING = Plain(str, "a text"), Plain(bool, "true or false"), Plain(float, "a number"), Anything()
FINITE = Plain(float, "a finite number", finite=True)


@dataclass(frozen=True)
class Whole(Schema):
    """A whole number from `low` to `high`."""

    low: int = 0
    high: int = LARGEST

    def wrong(self, value: object) -> Iterator[tuple[str, object, str]]:
        if not isinstance(value, int) or isinstance(value, bool) or not self.low <= value <= self.high:
            yield "", value, f"a whole number from {self.low} to {self.high}"


@dataclass(frozen=True)
class Word(Schema):
    """One of some words."""

    words: tuple[str, ...]

    def wrong(self, value: object) -> Iterator[tuple[str, object, str]]:
        if not isinstance(value, str) or value not in self.words:
            yield "", value, ", ".join(self.words)


@dataclass(frozen=True)
class Either(Schema):
    """What fits one of some schemas."""

    of: tuple[Schema, ...]

    def wrong(self, value: object) -> Iterator[tuple[str, object, str]]:
        found = [next(one.wrong(value), None) for one in self.of]
        if None not in found:
            yield "", value, " or ".join(allowed for _, _, allowed in found)


def maybe(one: Schema) -> Either:
    """What fits, or null."""
    return Either((one, Plain(type(None), "null")))


@dataclass(frozen=True)
class Many(Schema):
    """A list of what fits `of`."""

    of: Schema
    low: int = 0
    high: int = LARGEST

    def wrong(self, value: object) -> Iterator[tuple[str, object, str]]:
        if not isinstance(value, list) or not self.low <= len(value) <= self.high:
            yield "", value, f"a list of {self.low} to {self.high}"
            return
        for place, one in enumerate(value):
            for below, found, allowed in self.of.wrong(one):
                yield f"[{place}]{below}", found, allowed


@dataclass(frozen=True)
class Fields(Schema):
    """An object with all the fields `needed`, perhaps some that it `may` have, and with `others`, any number of those."""

    needed: Mapping[str, Schema]
    may: Mapping[str, Schema] = field(default_factory=dict)
    others: Schema | None = None

    def wrong(self, value: object) -> Iterator[tuple[str, object, str]]:
        if not isinstance(value, dict):
            yield "", value, "an object"
            return
        known = {**self.needed, **self.may}
        for name in self.needed:
            if name not in value:
                yield "", f"without {name}", f"the fields {', '.join(known)}"
        for name, one in value.items():
            schema = known.get(name, self.others)
            if schema is None:
                yield "", f"with {name}", f"the fields {', '.join(known)}"
                return
            for below, found, allowed in schema.wrong(one):
                yield f".{name}{below}", found, allowed


@dataclass(frozen=True)
class Variant(Schema):
    """An object of one of some kinds, which the word in its field `key` says."""

    key: str
    of: Mapping[str, Schema]

    def wrong(self, value: object) -> Iterator[tuple[str, object, str]]:
        kind = Fields({self.key: Word(tuple(self.of))}, others=ANYTHING)
        found = next(kind.wrong(value), None)
        yield from self.of[value[self.key]].wrong(value) if found is None else [found]


ANY_OBJECT = Fields({}, others=ANYTHING)


def check(schema: Schema, value: object, what: str) -> None:
    """Raise InputError where a value does not fit; it names the place in `what`, what is there and what is allowed."""
    for place, found, allowed in schema.wrong(value):
        raise InputError(f"{what}{short(place, 100)[1:-1]} is {short(found)}; allowed: {short(allowed, 300)[1:-1]}")
