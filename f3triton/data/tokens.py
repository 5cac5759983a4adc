"""From text to tokens and back: characters, bytes, or a file of the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..base.exceptions import InputError
from ..base.files import read_bytes
from ..base.schema import STRING, Fields, Word, check
from .columns import one_line

CHARACTERS, BYTES, FILE = "characters", "bytes", "file"
UNITS = {CHARACTERS: "character", BYTES: "byte", FILE: "token"}
LARGEST_FILE = 1 << 27  # bytes of a tokenizer's JSON
TOKENIZER = Fields({"kind": Word(tuple(UNITS)), "characters": STRING, "definition": STRING})


@dataclass(frozen=True)
class Tokenizer:
    """Of kind `characters` (those of the training text, in the order of their code points), `bytes` (of the text in UTF-8), or
    `file` (what the `tokenizers` library makes of the JSON in `definition`).
    """

    kind: str
    characters: str = ""
    definition: str = ""
    _made: list = field(default_factory=list, init=False, repr=False, compare=False)  # the library's object

    @property
    def unit(self) -> str:
        """What a token is: character, byte or token."""
        return UNITS[self.kind]

    @property
    def names(self) -> tuple[str, ...]:
        """The tokens by id, for people."""
        if self.kind == CHARACTERS:
            return tuple(self.characters)
        if self.kind == BYTES:
            return tuple(chr(i) if 32 <= i < 127 else f"0x{i:02x}" for i in range(256))
        vocabulary = self._library().get_vocab()
        names = [""] * (max(vocabulary.values(), default=-1) + 1)  # an id may be missing
        for name, i in vocabulary.items():
            names[i] = name
        return tuple(names)

    def encode(self, text: str | bytes, where: str) -> np.ndarray:
        """Token ids, int64 `[tokens]`. `where` names the text in messages.

        Raises InputError for a character that the training text did not have, or bytes that are no UTF-8.
        """
        if self.kind == BYTES:
            raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
            return np.frombuffer(raw, np.uint8).astype(np.int64)
        text = decoded(text, where)
        if self.kind == FILE:
            try:
                return np.array(self._library().encode(text, add_special_tokens=False).ids, np.int64)
            except Exception as error:  # the library raises no class of its own
                raise InputError(f"the tokenizer cannot encode {where}: {one_line(error)}") from None
        known, points = _code_points(self.characters), _code_points(text)
        ids = np.searchsorted(known, points).clip(max=len(known) - 1)
        unknown = np.flatnonzero(known[ids] != points)
        if len(unknown):
            character = text[unknown[0]]
            raise InputError(
                f"{where} has the character {character!r} (U+{ord(character):04X}, at {unknown[0]:,}), which the training text "
                "does not have; take it out, or use the tokenizer 'bytes'"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        if self.kind == BYTES:
            return bytes(ids).decode("utf-8", "replace")
        if self.kind == CHARACTERS:
            return "".join(self.characters[i] for i in ids)
        return self._library().decode(list(ids), skip_special_tokens=False)

    def _library(self) -> Any:
        if not self._made:
            self._made.append(_read_definition(self.definition, "the stored tokenizer"))
        return self._made[0]

    def to_json(self) -> dict[str, str]:
        """What `from_json` turns into an equal object."""
        return {"kind": self.kind, "characters": self.characters, "definition": self.definition}

    @classmethod
    def from_json(cls, content: Any) -> Tokenizer:
        """Raises InputError for anything that `to_json` does not give."""
        check(TOKENIZER, content, "stored preprocessing is broken: its tokenizer")
        points = _code_points(content["characters"])
        if (content["kind"] == CHARACTERS) != bool(len(points)) or (np.diff(points.astype(np.int64)) <= 0).any():
            raise InputError("stored preprocessing is broken: the tokenizer's characters are not in order")
        self = cls(**content)
        if self.kind == FILE:
            self._library()
        return self


def fit_tokenizer(kind: str, texts: Sequence[str | bytes], where: str) -> Tokenizer:
    """The tokenizer of a word or a file's name; `characters` are those of the `texts`.

    Raises InputError: no such word or file, a file that is no tokenizer, the library missing.
    """
    if kind == BYTES:
        return Tokenizer(BYTES)
    if kind == CHARACTERS:
        found: set[str] = set()
        for text in texts:
            found.update(decoded(text, where))
        if len(found) < 2:
            raise InputError(
                f"{where} has {f'one character only, {found.pop()!r}' if found else 'no character'}; needed are two"
            )
        return Tokenizer(CHARACTERS, "".join(sorted(found)))
    path = Path(kind).expanduser()
    if not path.is_file():
        raise InputError(f"tokenizer {kind!r} is no file; allowed: characters, bytes, or the JSON file of a tokenizer")
    try:
        definition = read_bytes(path.resolve(), LARGEST_FILE).decode()
    except ValueError as error:
        raise InputError(f"tokenizer {kind!r} cannot be read: {one_line(error)}") from None
    tokenizer = Tokenizer(FILE, definition=definition)
    tokenizer._made.append(_read_definition(definition, f"tokenizer {kind!r}"))
    return tokenizer


def decoded(text: str | bytes, where: str) -> str:
    """A text that may be bytes still. Raises InputError where they are no UTF-8."""
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is no UTF-8 text (byte {error.start:,}); use the tokenizer 'bytes'") from None


def _read_definition(definition: str, what: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise InputError(f"{what} needs the package 'tokenizers': pip install tokenizers") from None
    try:
        json.loads(definition)
        return tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises no class of its own
        raise InputError(f"{what} is no JSON file of the tokenizers library: {one_line(error)}") from None


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
