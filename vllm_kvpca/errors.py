"""Every error a user of vllm-kvpca can meet, in one tree.

    KvpcaError
      OptionsError        a flag or an `additional_config["kv_compression"]` value is wrong
      UnsupportedError    a model, layer or vLLM option that cannot be combined with compression
      LayoutError         bands that cannot be laid out in a page
      PresetError
        PresetNotFound    no such folder, Hub repository or shipped name
        PresetInvalid     a file is missing, truncated, malformed, or holds no sound basis
        PresetMismatch    a sound preset that belongs to another model or shape
      CalibrationError    the calibration or evaluation text does not suffice
      SetupError          something on this machine must be installed or repaired first
      OutputError         a file cannot be written: a full or read-only disk

Each message says what is wrong and what to do about it. All of them are ValueErrors
so that vLLM and argparse report them as bad input and not as a crash.
"""


class KvpcaError(ValueError):
    """Base class of all errors raised by vllm-kvpca."""


class OptionsError(KvpcaError):
    """An option has a value that makes no sense."""


class UnsupportedError(KvpcaError):
    """The model or a vLLM option cannot be combined with KV compression."""


class LayoutError(KvpcaError):
    """Bands do not fit the head dimension or the page."""


class PresetError(KvpcaError):
    """Base class of what can be wrong with a preset."""


class PresetNotFound(PresetError):
    """The preset is neither a folder, nor a Hub repository, nor a shipped name."""


class PresetInvalid(PresetError):
    """The preset's files are damaged or hold values that cannot be used."""


class PresetMismatch(PresetError):
    """The preset was made for another model or shape."""


class CalibrationError(KvpcaError):
    """There is too little text, or text that must not be used."""


class SetupError(KvpcaError):
    """A package, file or plugin is missing on this machine."""


def install_extra(name: str) -> str:
    """The command that adds an optional part of this package to the environment it runs in.

    The package is on no index yet: once it is, its name takes the place of the clone here.
    """
    return f'pip install ".[{name}]" in a clone of vllm-kvpca'


class OutputError(KvpcaError):
    """A file cannot be written: the disk is full or read-only, or the folder is another's."""
