"""Whether a text was used for calibration: a sketch of the texts, kept in the preset's folder.

`calibration.json` holds name, size and sha256 of each text, and hashes of some of its shingles
(runs of SHINGLE words): the SKETCH smallest of all hashes, a random sample that needs no text to
be compared with (Broder, On the resemblance and containment of documents, 1997). A copied passage
is found once it is long enough to hold a sampled shingle: after about three times
(words of calibration text / SKETCH) words with a probability of 95 %.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from vllm_kvpca.calibration.text import TextFile, describe
from vllm_kvpca.errors import CalibrationError, PresetInvalid
from vllm_kvpca.preset.find import CARD_FILE, TEXTS_FILE, read_file
from vllm_kvpca.whole_files import whole_files

SHINGLE = 50
"""Words of a shingle: more than licence lines and idioms that unrelated texts share."""
SKETCH = 4096
ALLOWED_SHARE = 0.01
"""Of the evaluation text. Boilerplate that many files carry stays below it."""
_BATCH_WORDS = 1 << 18
_BITS = 48
"""Of a stored hash: twelve hexadecimal digits."""

Hashes = NDArray[np.uint64]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Text(_Strict):
    """A text that was read for calibration."""

    name: str
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]


class CalibrationTexts(_Strict):
    """`calibration.json`.

    Attributes:
        shingle_words: words of a shingle.
        shingles: the smallest hashes of all shingles, ascending, hexadecimal.
    """

    texts: Annotated[tuple[Text, ...], FailFast()]
    shingle_words: int = Field(ge=1, le=1000)
    shingles: Annotated[tuple[Hash, ...], FailFast()] = Field(max_length=SKETCH)


def of_files(files: Sequence[Path]) -> CalibrationTexts:
    """What `calibration.json` says about these texts."""
    kept = np.empty(0, np.uint64)
    for path in files:
        for hashes in shingle_hashes(path, SHINGLE):
            kept = np.union1d(kept, hashes)[:SKETCH]
    described: Iterable[TextFile] = (describe(path) for path in files)
    return CalibrationTexts(
        texts=tuple(Text(name=t.name, bytes=t.bytes, sha256=t.sha256) for t in described),
        shingle_words=SHINGLE,
        shingles=tuple(f"{int(value):012x}" for value in kept),
    )


def to_json(files: Sequence[Path]) -> str:
    """Text of `calibration.json` of these texts."""
    return of_files(files).model_dump_json() + "\n"


def save(folder: Path, files: Sequence[Path]) -> None:
    """Write `calibration.json` of texts into a preset's folder."""
    with whole_files(folder) as new:
        (new / TEXTS_FILE).write_text(to_json(files))


def load(folder: Path) -> CalibrationTexts | None:
    """What is known of a preset's texts; None for a preset from before `calibration.json`.

    Raises:
        PresetInvalid: the file is damaged.
    """
    path = folder / TEXTS_FILE
    content = read_file(folder, TEXTS_FILE)
    if content is None:
        return None
    try:
        return CalibrationTexts.model_validate_json(content)
    except (ValidationError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise PresetInvalid(f"{path} cannot be read ({first}): calibrate anew.") from error


def check(name: str, folder: Path, files: Sequence[Path]) -> float | None:
    """Refuse to evaluate a preset on its own calibration text.

    Args:
        name: the preset, for messages.
        folder: of the preset.
        files: texts of the evaluation.

    Returns:
        Estimated share of the evaluation text that was calibrated on, at most ALLOWED_SHARE;
        None if only whole files could be compared, because the preset has no `calibration.json`.

    Raises:
        CalibrationError: a file was calibrated on, or too large a share of the text.
    """
    known = load(folder)
    # Cards of older presets list the checksums as well.
    sums = {t.sha256 for t in known.texts} if known else set()
    listed = (read_file(folder, CARD_FILE) or b"").decode(errors="replace")
    way_out = "give --text that it has not seen, or measure a preset that needs no calibration."
    for path in files:
        digest = describe(path).sha256
        if digest in sums or digest in listed:
            raise CalibrationError(
                f"preset {name!r} was calibrated on {path.name}, so it says nothing about other "
                f"text: {way_out}"
            )
    if known is None:
        return None
    share = shared(known, files)
    if share > ALLOWED_SHARE:
        raise CalibrationError(
            f"about {share:.0%} of the evaluation text is in the calibration text of preset "
            f"{name!r}: {way_out}"
        )
    return share


def shared(known: CalibrationTexts, files: Sequence[Path]) -> float:
    """Estimated share of the shingles of `files` that occur in the calibration texts.

    Shingles of `files` with hashes up to the largest one kept are a sample of them, and each is
    known for sure to be a calibration shingle or not.
    """
    if not known.shingles:
        return 0.0
    kept = np.array([int(value, 16) for value in known.shingles], np.uint64)
    # All shingles were kept if there were too few to fill the sketch.
    top = kept.max() if len(kept) == SKETCH else np.uint64(2**_BITS)
    found = sampled = 0
    for path in files:
        for hashes in shingle_hashes(path, known.shingle_words):
            sample = hashes[hashes <= top]
            sampled += len(sample)
            found += int(np.isin(sample, kept).sum())
    return found / sampled if sampled else 0.0


def shingle_hashes(path: Path, words: int) -> Iterator[Hashes]:
    """48-bit hashes of all runs of `words` words of a text, in arrays of bounded size."""
    with path.open(encoding="utf-8", errors="replace") as file:
        stream = (_word_hash(word) for line in file for word in line.split())
        batch = np.fromiter(itertools.islice(stream, _BATCH_WORDS), np.uint64)
        while len(batch) >= words:
            yield _rolled(batch, words)
            more = np.fromiter(itertools.islice(stream, _BATCH_WORDS), np.uint64)
            batch = np.concatenate([batch[-(words - 1) :] if words > 1 else batch[:0], more])


def _rolled(words: Hashes, count: int) -> Hashes:
    """A polynomial of `count` neighbours modulo 2^64, then mixed so that every bit depends on
    all (the finalizer of splitmix64, Steele et al., 2014)."""
    total = np.zeros(len(words) - count + 1, np.uint64)
    for i in range(count):
        total = total * np.uint64(0x9E3779B97F4A7C15) + words[i : i + len(total)]
    total = (total ^ (total >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    total = (total ^ (total >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (total ^ (total >> np.uint64(31))) >> np.uint64(64 - _BITS)


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
