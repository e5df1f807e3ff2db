"""Windows of text: even, without overlap, refused when there is too little."""

import pytest

from vllm_kvpca.calibration import text
from vllm_kvpca.errors import CalibrationError
from vllm_kvpca.lab import texts


class Letters:
    """A tokenizer: one token per character, and a first token for every text if asked."""

    def __init__(self, start=()):
        self.start = list(start)

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(letter) for letter in text]
        self.input_ids = (self.start if add_special_tokens else []) + ids
        return self


@pytest.fixture
def files(tmp_path):
    for name, size in (("a", 100), ("b", 35)):
        # Characters that tell their place: position in the file, and the file itself.
        first = 1000 if name == "a" else 2000
        text = "".join(chr(first + i) for i in range(size))
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    return sorted(tmp_path.glob("*.txt"))


def test_windows_are_shared_out_and_do_not_overlap(files):
    windows = texts.windows(Letters(), files, 6, 10)
    assert [window[0] // 1000 for window in windows] == [1, 1, 1, 2, 2, 2]
    assert all(len(window) == 10 for window in windows)
    tokens = [token for window in windows for token in window]
    assert len(set(tokens)) == len(tokens)
    assert windows[0][0] == 1000 and windows[2][-1] == 1099


def test_each_window_begins_as_the_tokenizer_wants(files):
    windows = texts.windows(Letters(start=[7]), files, 3, 10)
    assert all(window[0] == 7 and len(window) == 10 for window in windows)
    assert all(token >= 1000 for window in windows for token in window[1:])


def test_too_little_text_says_how_much_is_missing(files):
    with pytest.raises(CalibrationError, match=r"13 windows of 10 .* 15 .* 20 tokens"):
        texts.windows(Letters(), files, 15, 10)


@pytest.mark.parametrize("count", [1, 2, 7, 13])
def test_share_out_fills_up_evenly(count):
    room = [10, 3, 0, 4]
    given = texts.share_out(count, room)
    assert sum(given) == count
    assert all(got <= most for got, most in zip(given, room, strict=True))
    not_full = [got for got, most in zip(given, room, strict=True) if got < most]
    assert not not_full or max(given) - min(not_full) <= 1


def test_files_are_found_by_the_reader_of_calibrate():
    assert texts.find_texts is text.find_texts
