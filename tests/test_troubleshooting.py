"""The page on troubleshooting has every refusal and warning of the code, by its words."""

import re
from pathlib import Path

from messages import GAP, messages, of_source

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
PHRASES = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
SHORTEST = 10
"""Characters: a shorter phrase could stand for anything."""
MADE_OF_PARTS = {
    "serving/adapters/guard.py": ("serving/register.py", "is tested with", "does not fit this"),
    "hf_cache/cache.py": ("preset/identity.py", "was calibrated on weights of"),
    "serving/settings/refusals.py": (
        "preset/identity.py",
        *("by the model's name alone", "was calibrated on other weights", "cannot be"),
        "It is served all the same, as asked",
    ),
    "whole_files.py": ("whole_files.py", "cannot write to"),
}
"""Where a message comes in a variable: the file that words it, and its words."""


def undocumented(found: dict[str, str], phrases: list[str]) -> dict[str, str]:
    """Messages that no phrase is part of, and where they are."""
    return {
        place: text
        for place, text in found.items()
        if text.strip(f"{GAP} .") and not any(phrase in text for phrase in phrases)
    }


def test_every_message_of_the_code_is_in_the_page():
    found = messages()
    assert len(found) > 100
    assert undocumented(found, PHRASES) == {}


def test_every_row_of_the_page_is_a_message_of_the_code():
    words = [word for _, *words in MADE_OF_PARTS.values() for word in words]
    texts = list(messages().values())
    stale = [phrase for phrase in PHRASES if not any(phrase in text for text in texts)]
    assert [phrase for phrase in stale if not any(word in phrase for word in words)] == []
    assert [phrase for phrase in PHRASES if len(phrase) < SHORTEST and "--" not in phrase] == []


def test_messages_that_come_in_variables_are_known_and_in_the_page():
    unworded = {
        place.partition(":")[0] for place, text in messages().items() if not text.strip(f"{GAP} .")
    }
    assert unworded == set(MADE_OF_PARTS)
    for file, *words in MADE_OF_PARTS.values():
        source = (ROOT / "vllm_kvpca" / file).read_text()
        assert all(word in source and word in PAGE for word in words)


def test_a_message_is_read_as_its_user_sees_it():
    source = """
_AGAIN = "Do it again."
raise OptionsError(
    f"--size {size} is too large: "
    f"take less. {_AGAIN}"
)
logger.warning("no effect for %d tokens", count)
raise OSError("not ours")
wrong = [(size > 3, f"--size {size} above 3"), ("a", "b")]
"""
    assert {text for _, text in of_source(source, tables=True)} == {
        "--size … is too large: take less. Do it again.",
        "no effect for … tokens",
        "--size … above 3",
    }
    found = {str(line): text for line, text in of_source(source)}
    assert undocumented(found, ["is too large: take less"]) == {"7": "no effect for … tokens"}
