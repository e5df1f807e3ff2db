"""Windows against tokenizing whole files at once; refusals with their numbers."""

import os
import random
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_kvpca.calibration import text
from vllm_kvpca.errors import CalibrationError

ALL = 10**9


def whole(path: Path, tokenizer: Any) -> list[int]:
    return tokenizer(path.read_bytes().decode(), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("piece", [1, 2, 7, 64, 1000, 1 << 16])
def test_small_pieces_give_the_tokens_of_the_whole_file(
    tokenizer: Any, text_file: Path, piece: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text, "PIECE_CHARS", piece)
    windows = list(text.windows([text_file], tokenizer, 64, ALL))
    assert list(chain(*windows)) == whole(text_file, tokenizer)
    assert {len(window) for window in windows[:-1]} == {64}
    assert 0 < len(windows[-1]) <= 64


def test_no_window_spans_two_files_and_files_take_turns(tokenizer: Any, tmp_path: Path):
    paths = [tmp_path / name for name in ("a.txt", "b.txt", "empty.txt")]
    paths[0].write_text("a" * 3 + " mat" * 100)
    paths[1].write_text("and" + " cat" * 20)
    paths[2].write_text("")
    ids = [whole(path, tokenizer) for path in paths]
    windows = list(text.windows(paths, tokenizer, 16, ALL, seed=0))

    def of(i: int) -> list[list[int]]:
        return [ids[i][start : start + 16] for start in range(0, len(ids[i]), 16)]

    assert sorted(windows) == sorted(of(0) + of(1))
    firsts = [of(0)[0], of(1)[0]]
    assert windows[0] in firsts and windows[1] in firsts and windows[0] != windows[1]


def test_the_budget_is_kept_exactly(tokenizer: Any, text_file: Path):
    windows = list(text.windows([text_file], tokenizer, 64, 100))
    assert [len(window) for window in windows] == [64, 36]
    assert list(chain(*windows)) == whole(text_file, tokenizer)[:100]


def test_windows_begin_as_the_tokenizer_begins_texts(bos_tokenizer: Any, text_file: Path):
    tokenizer = bos_tokenizer
    assert text.leading_tokens(tokenizer) == [tokenizer.bos_token_id]
    windows = list(text.windows([text_file], tokenizer, 64, ALL))
    assert all(window[0] == tokenizer.bos_token_id for window in windows)
    assert {len(window) for window in windows[:-1]} == {64}
    assert list(chain(*(window[1:] for window in windows))) == whole(text_file, tokenizer)


def test_the_seed_decides_the_order_alone(tokenizer: Any, words: str, tmp_path: Path):
    paths = []
    for i in range(6):
        paths.append(tmp_path / f"{i}.txt")
        paths[-1].write_text(f"{i} {words}")
    runs = {
        seed: [list(text.windows(paths, tokenizer, 32, ALL, seed)) for _ in "ab"]
        for seed in range(3)
    }
    assert all(first == second for first, second in runs.values())
    assert len({str(first) for first, _ in runs.values()}) > 1
    assert len({str(sorted(first)) for first, _ in runs.values()}) == 1


def test_a_file_is_read_no_further_than_needed(
    tokenizer: Any, text_file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text, "PIECE_CHARS", 100)
    read = []
    pieces = text._pieces
    monkeypatch.setattr(
        text, "_pieces", lambda path: (read.append(len(p)) or p for p in pieces(path))
    )
    list(text.windows([text_file], tokenizer, 16, 64))
    assert 64 <= sum(read) < text_file.stat().st_size / 10


@pytest.mark.parametrize("content", [b"\xff\xfe\x00" * 500, b"x" * 5000, b" " * 5000, b"\n"])
def test_what_has_no_words_is_read_in_bounded_pieces(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text, "PIECE_CHARS", 100)
    path = tmp_path / "odd.txt"
    path.write_bytes(content)
    pieces = list(text._pieces(path))
    assert "".join(pieces) == content.decode(errors="replace")
    assert max(map(len, pieces)) <= text.LONGEST_WORD + 100


def test_too_little_text_is_refused_with_both_numbers(tokenizer: Any, text_file: Path):
    tokens = len(whole(text_file, tokenizer))
    with pytest.raises(CalibrationError, match=rf"only {tokens:,} tokens.*at least 12,800"):
        text.count_tokens([text_file], tokenizer, 64, 100_000, head_dim=128)
    with pytest.raises(CalibrationError, match=r"--tokens 1000 is too few.*at least 12,800"):
        text.count_tokens([text_file], tokenizer, 64, 1000, head_dim=128)
    assert text.count_tokens([text_file], tokenizer, 64, 100_000, head_dim=16) == tokens
    assert text.count_tokens([text_file], tokenizer, 64, 1700, head_dim=16) == 1700


def test_files_are_found_by_name_and_in_folders(tmp_path: Path, text_file: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("b.txt", "a.txt", "c.md"):
        (folder / name).write_text("the cat sat")
    in_folder = [folder / "a.txt", folder / "b.txt"]
    assert text.find_texts([folder, text_file]) == [*in_folder, text_file]
    assert text.find_texts([folder / "c.md"]) == [folder / "c.md"]
    assert text.find_texts([text_file, folder / "b.txt", text_file, folder]) == [
        *(text_file, folder / "b.txt", folder / "a.txt"),
    ]
    with pytest.raises(CalibrationError, match=r"missing\.txt is not there"):
        text.find_texts([tmp_path / "missing.txt"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CalibrationError, match="pipe is no regular file"):
        text.find_texts([tmp_path / "pipe"])


def test_a_folder_stands_for_all_texts_in_it_and_below(tmp_path: Path):
    names = ("z.txt", "b/2.txt", "b/1.TXT", "b/c/3.txt")
    others = ("a.md", "b/picture.png", ".git/log.txt", "b/.4.txt")
    for name in (*names, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("the cat sat")
    (tmp_path / "b" / "folder.txt").mkdir()
    (tmp_path / "round").symlink_to(tmp_path)  # a circle
    wanted = [tmp_path / name for name in ("b/1.TXT", "b/2.txt", "b/c/3.txt", "z.txt")]
    assert text.find_texts([tmp_path]) == wanted
    assert text.find_texts([tmp_path / "b" / "c", tmp_path]) == [
        *(wanted[2], wanted[0], wanted[1], wanted[3]),
    ]


def test_a_folder_without_a_text_is_refused_with_what_is_there(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match=r"empty is empty"):
        text.find_texts([tmp_path / "empty"])
    (tmp_path / "a.md").write_text("the cat sat")
    (tmp_path / "Makefile").write_text("all:")
    words = r"no \.txt file in .*, only \.md, Makefile: .* --text .*(a\.md|Makefile)"
    with pytest.raises(CalibrationError, match=words):
        text.find_texts([tmp_path])


NO_TEXT = {
    "random": random.Random(0).randbytes(5000),
    "library": Path(torch._C.__file__).read_bytes()[:100_000],
    "utf16": "the cat sat on the mat".encode("utf-16"),
    "late": b"the cat sat " * 200_000 + b"\0",
    "latin1": "Où est passée la clé ? Ça dépend.".encode("latin1") * 20,
}


@pytest.mark.parametrize("name", list(NO_TEXT))
def test_what_is_no_text_is_refused_by_name(name: str, tmp_path: Path, text_file: Path):
    path = tmp_path / f"{name}.txt"
    path.write_bytes(NO_TEXT[name])
    for paths in ([path], [text_file, path], [tmp_path]):
        with pytest.raises(CalibrationError, match=rf"{name}\.txt is no text.*UTF-8"):
            text.find_texts(paths)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        "Größe, déjà vu, 漢字, \U0001f600".encode() * 50,
        b"the cat sat on the mat\f\x1b[0m\r\n" * 50 + b"\xff\xfe",
        ("x" * ((1 << 20) - 1) + "é").encode(),  # a character across two pieces
    ],
)
def test_texts_with_a_few_odd_bytes_are_texts(content: bytes, tmp_path: Path):
    path = tmp_path / "odd.txt"
    path.write_bytes(content)
    assert text.find_texts([path]) == [path]


def test_a_file_is_described_by_content(tmp_path: Path):
    path = tmp_path / "abc.txt"
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert text.describe(path) == text.TextFile("abc.txt", 3, known)
