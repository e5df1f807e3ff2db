"""What the engine tests of this folder compare a GPU's answers with: the CPU's.

    python tests/gpu/cpu_answers.py    # with vLLM's CPU build: writes cpu_answers.json

Prompts are the first tokens of the repository's licence; the file keeps answers alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from engines import GREEDY, run, text_prompts

FILE = Path(__file__).with_name("cpu_answers.json")
LENGTHS = [40, 120, 300, 700, 1500, 3000]
SAMPLING = {**GREEDY, "max_tokens": 48}
THRESHOLDS = {"compress_after": 256, "keep_recent": 128}


def main() -> None:
    rounds = [{"prompts": text_prompts(LENGTHS), "sampling": SAMPLING}]
    presets = {"stock": None, "k8v4": {"preset": "k8v4", **THRESHOLDS}}
    answers = {
        name: [
            {"tokens": answer["tokens"], "gaps": [round(gap, 4) for gap in answer["gaps"]]}
            for answer in run(rounds, options)["rounds"][0]
        ]
        for name, options in presets.items()
    }
    FILE.write_text(json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
