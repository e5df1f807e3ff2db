"""Text files to token windows, read piece by piece: a file may be larger than memory.

Windows are taken from the files in turn, so that a large file does not crowd out the others, and
from each file in order. No window spans two files. What does not fill a window at a file's end is
a shorter one.
"""

from __future__ import annotations

import codecs
import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kvpca.errors import CalibrationError

PIECE_CHARS = 1 << 16
LONGEST_WORD = 1000
CHECK_BYTES = 1 << 20
NOT_UTF8 = 0.01
"""Of a file's characters. Prose of most languages in latin1 has more, a damaged text less."""
TOKENS_PER_DIMENSION = 100
"""A basis needs at least this many tokens for each dimension of a head.

The entries of a second moment estimated from n samples are off by about 1/sqrt(n); in d dimensions
its eigenvectors then lose a share of about d/n of what the best basis captures: 1 % at n = 100 d.
Neighbouring tokens are not independent, so this is a floor; the default budget is far above it.
"""
SUFFIX = ".txt"
"""Of the files that a folder stands for; files given by name may have any."""
SHOWN = 5
"""Kinds of files that a refusal lists."""
_WORD_END = re.compile(r".*\w(?=\s)", re.DOTALL)


@dataclass(frozen=True)
class TextFile:
    """A text that was read: name without folders, size, sha256 of its content."""

    name: str
    bytes: int
    sha256: str


def find_texts(paths: Sequence[Path]) -> list[Path]:
    """Text files by name, without repetitions; a folder stands for the .txt files in it.

    Every command that reads text finds its files here. A folder is searched with its subfolders,
    but not what is hidden there (names that begin with a dot), in the order of the paths.

    Raises:
        CalibrationError: a path that is not there, a folder without a .txt file, a file that is
            no text.
    """
    files: list[Path] = []
    for path in paths:
        files += _in_folder(path) if path.is_dir() else [path]
    files = list({path.resolve(): path for path in files}.values())
    for path in files:
        check_text(path)
    return files


def _in_folder(folder: Path) -> list[Path]:
    """Its text files.

    Raises:
        CalibrationError: there are none, with what else is there.
    """
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not path.is_dir()
    ]
    found = [path for path in files if path.suffix.lower() == SUFFIX]
    if found:
        return found
    if not files:
        raise CalibrationError(f"{folder} is empty: give --text a folder with .txt files.")
    kinds = sorted({path.suffix or path.name for path in files})
    listed = ", ".join(kinds[:SHOWN]) + (", ..." if len(kinds) > SHOWN else "")
    raise CalibrationError(
        f"there is no .txt file in {folder} or below, only {listed}: other files are taken by "
        f"name, --text {files[0]}."
    )


def check_text(path: Path) -> None:
    """Refuse what is no text: tokens of a program or a picture say nothing about a model.

    A few bytes that are no UTF-8 are let pass; readers replace them.

    Raises:
        CalibrationError: the file is not there, holds a NUL (no text does, and nearly all binary
            formats do), or more than NOT_UTF8 of it is no UTF-8.
    """
    if not path.is_file():
        what = "is no regular file" if path.exists() else "is not there"
        raise CalibrationError(
            f"{path} {what}: give --text files of text or folders of .txt files."
        )
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    characters = wrong = 0
    with path.open("rb") as file:
        while chunk := file.read(CHECK_BYTES):
            if b"\0" in chunk:
                raise CalibrationError(
                    f"{path} is no text: it holds NUL bytes. Give --text files of text in UTF-8."
                )
            text = decoder.decode(chunk)
            characters += len(text)
            wrong += text.count("\ufffd")
    if wrong > NOT_UTF8 * characters:
        raise CalibrationError(
            f"{path} is no text in UTF-8: {wrong / characters:.0%} of its characters cannot be "
            "read. If it is text, convert it (iconv -f latin1 -t utf-8)."
        )


def describe(path: Path) -> TextFile:
    """Name, size and sha256 of a file, for the record."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return TextFile(path.name, path.stat().st_size, digest)


def windows(
    paths: Sequence[Path], tokenizer: Any, length: int, tokens: int, seed: int = 0
) -> Iterator[list[int]]:
    """Token windows from the files in turn, in an order shuffled by `seed`.

    Every window begins with what the tokenizer puts before a text (a <bos>, or nothing).

    Args:
        tokenizer: of transformers.
        length: tokens of a window.
        tokens: stop after this many, all windows together.

    Yields:
        Lists of 1 to `length` token ids.
    """
    prefix = leading_tokens(tokenizer)
    order = list(paths)
    random.Random(seed).shuffle(order)
    readers = [_file_windows(path, tokenizer, length - len(prefix)) for path in order]
    while readers and tokens > 0:
        for reader in list(readers):
            window = next(reader, None)
            if window is None:
                readers.remove(reader)
                continue
            window = (prefix + window)[:tokens]
            tokens -= len(window)
            yield window
            if tokens <= 0:
                return


def leading_tokens(tokenizer: Any) -> list[int]:
    """Token ids the tokenizer puts before every text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return full[: next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)]


def count_tokens(
    paths: Sequence[Path], tokenizer: Any, length: int, tokens: int, head_dim: int, seed: int = 0
) -> int:
    """How many tokens `windows` will give, at most `tokens`.

    Raises:
        CalibrationError: too few for heads of this size, with how many there are and are needed.
    """
    needed = TOKENS_PER_DIMENSION * head_dim
    rule = f"heads of {head_dim} dimensions need at least {needed:,}"
    if tokens < needed:
        raise CalibrationError(f"--tokens {tokens} is too few: {rule}.")
    found = sum(len(window) for window in windows(paths, tokenizer, length, tokens, seed))
    if found < needed:
        raise CalibrationError(
            f"the text holds only {found:,} tokens: {rule}. Add files to --text."
        )
    return found


def _file_windows(path: Path, tokenizer: Any, length: int) -> Iterator[list[int]]:
    buffer: list[int] = []
    for piece in _pieces(path):
        buffer += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        full = len(buffer) - len(buffer) % length
        yield from (buffer[i : i + length] for i in range(0, full, length))
        buffer = buffer[full:]
    if buffer:
        yield buffer


def _pieces(path: Path) -> Iterator[str]:
    """The text in pieces that end with a word: there tokenizers cut anyway."""
    rest = ""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        while chunk := file.read(PIECE_CHARS):
            rest += chunk
            match = _WORD_END.match(rest)
            # What has no word end for so long is no prose, and is cut anywhere.
            end = match.end() if match else len(rest) if len(rest) >= LONGEST_WORD else 0
            if not end:
                continue
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest
