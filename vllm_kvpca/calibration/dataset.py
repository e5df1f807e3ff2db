"""A dataset of the Hub as calibration text: its rows become one text file in the user's cache.

From there on it is a text like any other: it has a name and a checksum, and a second run reads
the file and needs no network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kvpca.errors import CalibrationError, OptionsError, SetupError
from vllm_kvpca.whole_files import whole_files

CHARS_PER_TOKEN = 10
"""Enough text for a budget of tokens: prose has about 4 characters a token, code fewer."""


@dataclass(frozen=True)
class DatasetName:
    """NAME[@CONFIG][:SPLIT[:COLUMN]], e.g. Salesforce/wikitext@wikitext-2-raw-v1:train:text."""

    name: str
    config: str | None = None
    split: str = "train"
    column: str = "text"

    @classmethod
    def parse(cls, text: str) -> DatasetName:
        """
        Raises:
            OptionsError: it has another form.
        """
        match = re.fullmatch(
            r"(?P<name>[^:@]+)(@(?P<config>[^:@]+))?(:(?P<split>[^:]+)(:(?P<column>[^:]+))?)?", text
        )
        if match is None:
            raise OptionsError(f"--dataset {text!r}: write NAME[@CONFIG][:SPLIT[:COLUMN]].")
        return cls(**{key: value for key, value in match.groupdict().items() if value})


def fetch(wanted: DatasetName, tokens: int, folder: Path) -> Path:
    """A text file with enough of the dataset for a budget of `tokens`, in `folder`.

    Raises:
        SetupError: the package `datasets` is missing.
        CalibrationError: the Hub does not give the dataset, or it has no such column of text.
    """
    limit = tokens * CHARS_PER_TOKEN
    parts = (wanted.name, wanted.config, wanted.split, wanted.column, str(limit))
    words = "-".join(part for part in parts if part)
    path = folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', words).strip('-.')}.txt"
    if not path.exists():
        write_text(_rows(wanted), wanted, limit, path)
    return path


def write_text(
    rows: Iterable[Mapping[str, Any]], wanted: DatasetName, limit: int, path: Path
) -> None:
    """Rows of text, one after the other, up to `limit` characters.

    Raises:
        CalibrationError: no such column, or one that holds no text.
        OutputError: the file cannot be written.
    """
    written = 0
    # What is no character of a text (half a surrogate pair, NUL) would make the file no text.
    with (
        whole_files(path.parent) as new,
        (new / path.name).open("w", encoding="utf-8", errors="replace") as file,
    ):
        for row in rows:
            value = row.get(wanted.column)
            if not isinstance(value, str):
                raise CalibrationError(
                    f"dataset {wanted.name} has no text in a column {wanted.column!r}; it has "
                    f"{', '.join(row)}: write NAME:SPLIT:COLUMN."
                )
            written += file.write(value.replace("\0", "").rstrip("\n") + "\n")
            if written >= limit:
                break


def _rows(wanted: DatasetName) -> Iterable[Mapping[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SetupError(
            "--dataset needs the package datasets: pip install datasets, or give files by --text."
        ) from error
    try:
        return load_dataset(wanted.name, wanted.config, split=wanted.split, streaming=True)
    except Exception as error:
        # The Hub client raises many unrelated types; to the user all mean "not there".
        reason = str(error).splitlines()[0] if str(error) else ""
        raise CalibrationError(
            f"the Hub did not give dataset {wanted.name}: {type(error).__name__}: {reason} "
            "Check the name and the network, or give files by --text."
        ) from error
