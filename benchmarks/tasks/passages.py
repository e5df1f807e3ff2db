"""Make passages.jsonl: passages of a text, the sentence that follows each, and one from elsewhere.

python benchmarks/tasks/passages.py TEXT [--count 24] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

PASSAGE_WORDS = 150
SENTENCE_WORDS = (10, 30)
OUTPUT = Path(__file__).with_name("passages.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    text = " ".join(arguments.text.read_text().split())
    sentences = re.findall(r"[^.!?]+[.!?]", text)
    least, most = SENTENCE_WORDS
    usable = [i for i, s in enumerate(sentences) if i > 40 and least <= len(s.split()) <= most]
    lines = []
    for index in draw.sample(usable, arguments.count):
        context = " ".join("".join(sentences[index - 40 : index]).split()[-PASSAGE_WORDS:])
        choices = [sentences[index].strip(), sentences[draw.choice(usable)].strip()]
        label = draw.randrange(2)
        if label:
            choices.reverse()
        lines.append(json.dumps({"context": context, "choices": choices, "label": label}))
    OUTPUT.write_text("\n".join(lines) + "\n")
    print(OUTPUT)


if __name__ == "__main__":
    main()
