"""Where a preset's name leads, and which files of a folder or of the Hub are taken."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_kvpca.errors import PresetInvalid, PresetNotFound
from vllm_kvpca.preset import FORMATS, find, list_shipped, load_preset, save_preset
from vllm_kvpca.preset.find import MAX_BYTES, file_of

SHIPPED = "HuggingFaceTB--SmolLM2-135M-Instruct/v-mixed"
REVISION = "0123456789abcdef0123456789abcdef01234567"


def save(folder: Path, format_name: str = "k8v8") -> Path:
    save_preset(folder, FORMATS[format_name], {}, "# A card\n")
    return folder


class FakeHub:
    """Repositories by name: files by name to their size. Downloads go to a cache as the Hub's."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.files: dict[str, dict[str, int | None]] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.downloaded: list[tuple[str, str | None, list[str]]] = []
        self.online = True

    def add(self, name: str, **sizes: int | None) -> None:
        folder = self.cache / f"models--{name.replace('/', '--')}"
        (folder / "blobs").mkdir(parents=True)
        snapshot = folder / "snapshots" / REVISION
        for file in save(self.cache / "made").iterdir():
            file.rename(folder / "blobs" / file.name)
            snapshot.mkdir(parents=True, exist_ok=True)
            (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
        self.files[name] = {"config.json": 400, "README.md": 10} | sizes

    def model_info(self, name, *, revision=None, files_metadata=False):
        self.asked.append((name, revision))
        if not self.online or name not in self.files:
            raise ConnectionError("offline\nsecond line")
        assert files_metadata
        sizes = self.files[name].items()
        siblings = [SimpleNamespace(rfilename=file, size=size) for file, size in sizes]
        return SimpleNamespace(sha=REVISION, siblings=siblings)

    def snapshot_download(self, name, revision=None, allow_patterns=(), local_files_only=False):
        folder = self.cache / f"models--{name.replace('/', '--')}" / "snapshots" / REVISION
        if local_files_only:
            if not folder.is_dir():
                raise FileNotFoundError("not in the cache")
        else:
            self.downloaded.append((name, revision, list(allow_patterns)))
        return str(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> FakeHub:
    fake = FakeHub(tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
    return fake


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# --- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["k8v4", SHIPPED])
def test_a_shipped_name_is_the_shipped_preset_whatever_lies_in_the_folder(name, caplog):
    save(Path(name))
    with caplog.at_level(logging.WARNING, logger="vllm.kvpca"):
        assert load_preset(name).config.format == name.rpartition("/")[2]
    assert f"write ./{name}" in caplog.text
    for own in (f"./{name}", str(Path(name).resolve()), Path(name)):
        assert load_preset(own).config.format == "k8v8"


def test_nothing_is_logged_where_nothing_is_ambiguous(caplog):
    save(Path("mine"))
    load_preset("k8v4")
    load_preset("./mine")
    assert not caplog.records


def test_a_bare_name_is_no_folder_and_the_refusal_says_how_to_name_one(hub):
    save(Path("mine"))
    with pytest.raises(PresetNotFound, match=r"no preset 'mine'.*write \./mine to take it"):
        load_preset("mine")
    assert load_preset("./mine").config.format == "k8v8"
    assert not hub.asked


def test_any_separator_names_a_folder(hub, working_directory, monkeypatch):
    save(Path("sub/mine"))
    monkeypatch.setenv("HOME", str(working_directory))
    for name in ("sub/mine", "./sub/mine", "../work/sub/mine", "~/sub/mine"):
        assert load_preset(name).config.format == "k8v8"
    monkeypatch.chdir("sub/mine")
    assert load_preset(".").config.format == "k8v8"
    assert not hub.asked


def test_a_shipped_name_comes_before_the_hub(hub):
    hub.add(SHIPPED)
    assert load_preset(SHIPPED).config.format == "v-mixed"
    assert not hub.asked


def test_shipped_folders_are_named_model_and_format(tmp_path, monkeypatch):
    save(tmp_path / "shipped" / "org--Model-1B" / "k8v8")
    monkeypatch.setattr(find, "shipped_root", lambda: tmp_path / "shipped")
    assert list(list_shipped()) == [*FORMATS, "org--Model-1B/k8v8"]


@pytest.mark.parametrize("name", list(list_shipped()))
def test_every_shipped_preset_loads(name, hub):
    assert load_preset(name).name == name
    assert not hub.asked


@pytest.mark.parametrize(
    "name",
    [
        *("k8v5", "./missing/folder", "./missing", "/missing", "~nobody-here/x", "a/b/c"),
        *("x" * 5000, "a\0b", "", "org/name@", "org/na me", "org/name@a b", "@main"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(name, hub):
    with pytest.raises(PresetNotFound, match=r"there is no preset .*k8v4.*give a folder"):
        load_preset(name)
    assert not hub.asked


def test_a_path_that_is_no_folder():
    with pytest.raises(PresetNotFound, match="no folder 'k8v4'"):
        load_preset(Path("k8v4"))


# --- the Hub --------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", [None, "v1.0", "refs/pr/1", REVISION])
def test_the_commit_that_was_looked_at_is_downloaded_and_a_presets_files_only(hub, revision):
    hub.add("someone/kv-preset", **{"pytorch_model.bin": 10**12})
    name = "someone/kv-preset" + (f"@{revision}" if revision else "")
    preset = load_preset(name)
    assert preset.config.format == "k8v8" and preset.name == name
    assert hub.asked == [("someone/kv-preset", revision)]
    files = ["config.json", "basis.safetensors", "README.md", "calibration.json", "weights.json"]
    assert hub.downloaded == [("someone/kv-preset", REVISION, files)]


@pytest.mark.parametrize("file", list(MAX_BYTES))
@pytest.mark.parametrize("more", [1, None])
def test_what_is_too_large_is_not_downloaded(hub, file, more):
    size = None if more is None else MAX_BYTES[file] + more
    hub.add("someone/kv-preset", **{file: size})
    with pytest.raises(PresetInvalid, match=rf"{file} of someone/kv-preset.*Nothing was down"):
        load_preset("someone/kv-preset")
    assert not hub.downloaded


def test_without_the_hub_the_copy_in_its_cache_is_taken(hub):
    hub.add("someone/kv-preset")
    hub.online = False
    assert load_preset("someone/kv-preset").config.format == "k8v8"
    assert not hub.downloaded


def test_a_hub_that_does_not_answer(hub):
    words = r"no folder or shipped preset 'someone/kv-preset'.*ConnectionError: offline Known"
    with pytest.raises(PresetNotFound, match=words):
        load_preset("someone/kv-preset")


def test_the_fake_is_called_as_the_real_client_can_be():
    """Names of arguments and attributes, against the library itself."""
    import inspect

    import huggingface_hub
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

    real = inspect.signature(huggingface_hub.HfApi().model_info)
    real.bind("org/name", revision="main", files_metadata=True)
    download = inspect.signature(huggingface_hub.snapshot_download)
    download.bind("org/name", revision="main", allow_patterns=["config.json"])
    download.bind("org/name", revision=None, local_files_only=True)
    sibling = {"rfilename": "config.json", "size": 7}
    info = ModelInfo(id="org/name", sha=REVISION, siblings=[sibling])
    assert info.sha == REVISION
    assert info.siblings == [RepoSibling("config.json", size=7)]


# --- links ----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", list(MAX_BYTES))
@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_out_of_the_folder_is_refused(tmp_path, file, absolute):
    folder = save(tmp_path / "preset")
    target = tmp_path / "secret"
    target.write_text("{}")
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(target if absolute else Path("../secret"))
    with pytest.raises(PresetInvalid, match=rf"{file} is a link that leads out"):
        file_of(folder, file)
    if file == "config.json":
        with pytest.raises(PresetInvalid, match="leads out"):
            load_preset(folder)


def test_the_basis_of_a_preset_may_not_be_such_a_link(tmp_path):
    folder = tmp_path / "preset"
    for file in list_shipped()[SHIPPED].iterdir():
        folder.mkdir(exist_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
    assert load_preset(folder).config.calibrated
    (folder / "basis.safetensors").rename(tmp_path / "basis.safetensors")
    (folder / "basis.safetensors").symlink_to(tmp_path / "basis.safetensors")
    with pytest.raises(PresetInvalid, match="leads out"):
        load_preset(folder)


def test_links_within_the_folder_and_to_the_folder_are_followed(tmp_path):
    folder = save(tmp_path / "preset")
    (folder / "config.json").rename(folder / "real.json")
    (folder / "config.json").symlink_to("real.json")
    (tmp_path / "link").symlink_to(folder)
    for one in (folder, tmp_path / "link"):
        assert load_preset(one).config.format == "k8v8"


def test_a_folder_of_the_hubs_cache_may_be_given(hub):
    hub.add("someone/kv-preset")
    snapshot = hub.cache / "models--someone--kv-preset" / "snapshots" / REVISION
    assert (snapshot / "config.json").is_symlink()
    assert load_preset(snapshot).config.format == "k8v8"
    (snapshot / "config.json").unlink()
    save(hub.cache / "outside")
    (snapshot / "config.json").symlink_to(hub.cache / "outside" / "config.json")
    with pytest.raises(PresetInvalid, match="leads out"):
        load_preset(snapshot)


@pytest.mark.parametrize("target", ["config.json", "missing", "/dev/zero"])
def test_links_to_nothing_in_a_circle_or_to_a_device(tmp_path, target):
    folder = save(tmp_path / "preset")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(target)
    with pytest.raises(PresetNotFound, match=r"has no config\.json"):
        load_preset(folder)


def test_a_pipe_is_no_file(tmp_path):
    folder = save(tmp_path / "preset")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(PresetNotFound, match=r"has no config\.json"):
        load_preset(folder)


def test_a_config_of_100_mb_is_not_read(tmp_path, monkeypatch):
    folder = save(tmp_path / "preset")
    with (folder / "config.json").open("r+b") as file:
        file.truncate(100_000_000)
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("it was read"))
    with pytest.raises(PresetInvalid, match="larger than 65536 bytes"):
        load_preset(folder)
