"""Write calibration.json of presets that were calibrated before it existed.

    python benchmarks/calibration_texts.py PRESET_FOLDER... --text FILES...

The texts must be those whose checksums the preset's card lists (benchmarks/texts.py makes those of
the shipped presets); `vllm-kvpca calibrate` writes the file itself.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from vllm_kvpca.calibration import overlap
from vllm_kvpca.lab.texts import find_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="+", type=Path)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    arguments = parser.parse_args()
    files = find_texts(arguments.text)
    have = {overlap.describe(path).sha256 for path in files}
    for folder in arguments.presets:
        listed = set(re.findall("`([0-9a-f]{64})`", (folder / "README.md").read_text()))
        if listed != have:
            sys.exit(f"{folder}: its card lists other texts than these.")
        overlap.save(folder, files)
        print(folder / "calibration.json")


if __name__ == "__main__":
    main()
