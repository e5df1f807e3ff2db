"""Where a preset's name leads: a shipped format or folder, a folder, or a repository of the Hub.

A bare name never means a folder, or whoever can write into the working directory would choose
another preset under a name that everybody knows. A folder is written with a separator: ./mine,
/srv/presets/mine, presets/mine.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from vllm_kvpca.errors import PresetInvalid, PresetNotFound
from vllm_kvpca.preset.formats import FORMATS

CONFIG_FILE = "config.json"
BASIS_FILE = "basis.safetensors"
CARD_FILE = "README.md"
TEXTS_FILE = "calibration.json"
WEIGHTS_FILE = "weights.json"
MAX_BYTES = {
    CONFIG_FILE: 1 << 16,
    BASIS_FILE: 1 << 30,
    CARD_FILE: 1 << 20,
    TEXTS_FILE: 1 << 20,
    WEIGHTS_FILE: 1 << 16,
}
"""A preset's files, and what they may hold. The largest basis of a known model is 0.3 GiB (80
layers of 64 KV heads of 128); no other file comes near."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)
_logger = logging.getLogger("vllm.kvpca")  # vLLM configures the logger "vllm" only


def shipped_root() -> Path:
    """Folder of the shipped presets: in the wheel, or `presets/` of a checkout."""
    package = Path(__file__).resolve().parent.parent
    packaged = package / "_presets"
    return packaged if packaged.is_dir() else package.parent / "presets"


def list_shipped() -> dict[str, Path | None]:
    """Names of all shipped presets; calibration-free formats have no folder."""
    names: dict[str, Path | None] = dict.fromkeys(FORMATS, None)
    root = shipped_root()
    for config in sorted(root.glob(f"*/*/{CONFIG_FILE}")):
        names[config.parent.relative_to(root).as_posix()] = config.parent
    return names


def preset_folder(name: str | os.PathLike[str]) -> Path | None:
    """Where a preset's files are, downloaded if need be; None for a named format.

    Args:
        name: as for `load_preset`.

    Raises:
        PresetNotFound: nothing of that name.
        PresetInvalid: a repository of the Hub whose files are too large.
    """
    text = os.fspath(name)
    folder = _folder(text)
    if isinstance(name, os.PathLike):  # pathlib drops the "./"
        if folder is None:
            raise PresetNotFound(f"there is no folder {text!r}.")
        return folder
    shipped = list_shipped()
    if text in shipped:
        if folder is not None:
            _logger.warning(
                "Preset %s is the shipped one. The folder of that name is another: write ./%s "
                "to take it.",
                *(text, text),
            )
        return shipped[text]
    if folder is not None and _has_separator(text):
        if _is_repository(text):
            _logger.warning(
                "Preset %s is the folder of that name, not a repository of the Hub: write ./%s to "
                "mean the folder.",
                *(text, text),
            )
        return folder
    hint = f"There is a folder of that name: write ./{text} to take it. " if folder else ""
    known = f"{hint}Known names: {', '.join(shipped)}. Or give a folder or a Hub repository "
    return _download(text, known + "org/name[@revision].")


def file_of(folder: Path, name: str) -> Path | None:
    """A file of a preset's folder, if it is there: a regular file in that folder, within its limit.

    The Hub's cache consists of links from snapshots/REVISION into blobs/; these are followed.

    Raises:
        PresetInvalid: it is too large, or a link that leads out of the folder.
    """
    path = folder / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):  # not there, a link to nothing, links in a circle
        return None
    if not real.is_file():
        return None
    home = folder.resolve()
    homes = [home]
    homes += [one.parent / "blobs" for one in (home, *home.parents) if one.name == "snapshots"]
    if not any(real.is_relative_to(one) for one in homes):
        raise PresetInvalid(
            f"{path} is a link that leads out of the preset's folder: put the file itself there."
        )
    if real.stat().st_size > MAX_BYTES[name]:
        raise PresetInvalid(
            f"{path} is larger than {MAX_BYTES[name]} bytes: not a preset's file. Download the "
            "preset again or calibrate anew."
        )
    return path


def read_file(folder: Path, name: str) -> bytes | None:
    """Content of a small file of a preset's folder (see `file_of`); None if it is not there."""
    path = file_of(folder, name)
    if path is None:
        return None
    with path.open("rb") as file:  # a file may grow after it was looked at
        return file.read(MAX_BYTES[name])


def _folder(name: str) -> Path | None:
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, ~ of an unknown user, a null byte
        return None


def _has_separator(name: str) -> bool:
    separators = [os.sep, *([os.altsep] if os.altsep else [])]
    return name in (".", "..") or name.startswith("~") or any(one in name for one in separators)


def _is_repository(name: str) -> bool:
    """Whether a name could be one of the Hub's."""
    return _HUB_NAME.fullmatch(name) is not None and not name.startswith(".")


def _download(name: str, known: str) -> Path:
    if not _is_repository(name):
        raise PresetNotFound(f"there is no preset {name!r}. {known}")
    repository, _, revision = name.partition("@")
    try:
        return _from_hub(repository, revision or None)
    except PresetInvalid:
        raise
    except Exception as error:
        # The Hub client raises many unrelated types; to the user all mean "not there".
        raise PresetNotFound(
            f"there is no folder or shipped preset {name!r}, and the Hub did not give it: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} {known}"
        ) from error


def _from_hub(repository: str, revision: str | None) -> Path:
    """The files of a preset, in the Hub's cache. Sizes are asked for before anything is fetched.

    Without the Hub a copy in the cache is taken; its files are checked like any other's.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except Exception:
        try:
            return Path(snapshot_download(repository, revision=revision, local_files_only=True))
        except Exception:
            pass  # the first error says why
        raise
    for file in info.siblings or []:
        most = MAX_BYTES.get(file.rfilename)
        if most is not None and (file.size is None or file.size > most):
            size = "of unknown size" if file.size is None else f"{file.size:,} bytes"
            raise PresetInvalid(
                f"{file.rfilename} of {repository} on the Hub is {size}; a preset's is at most "
                f"{most:,} bytes. Nothing was downloaded."
            )
    # The commit that was looked at, not whatever the branch is by now.
    folder = snapshot_download(repository, revision=info.sha, allow_patterns=list(MAX_BYTES))
    return Path(folder)
