"""hf:// names, against a stand-in of the hub: downloads, what is resumed and kept, and every refusal."""

import copy
import dataclasses
import os
import pickle
import shutil
import time
import types

import huggingface_hub.file_download
import pytest
from huggingface_hub import constants

from demo import chat
from rwkv_miss import UserError, read_checkpoint
from rwkv_miss.files import hub as files_of_hub
from rwkv_miss.files.hub import local_path, pin
from rwkv_miss.files.hub_names import DATA, MODEL, HubName, parse
from src.config import Config
from src.data.fetch import fetch_inputs, pinned_names
from src.data.formats import sources

from .hub_server import serving

CONTENT = bytes(range(256)) * 1201 + b"!"
CLOSED = "http://127.0.0.1:9"  # the port `discard`, where nobody listens


def point_at(endpoint, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    # versions before 1 have it here, later ones there
    for module in (constants, huggingface_hub.file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with a model and data; the cache is empty, nobody is logged in."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    with serving() as hub:
        point_at(hub.endpoint, monkeypatch)
        hub.commit = hub.add("o/n", {"README.md": "a", "m.pth": CONTENT, "config.json": "{}"})
        hub.add("o/d", {"a.jsonl": '{"text": "a"}\n', "b/b.jsonl": '{"text": "b"}\n'}, "datasets")
        yield hub
    # versions before 1 keep a session that is offline
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()


def refused(text, repo_type=MODEL):
    with pytest.raises(UserError) as error:
        local_path(text, repo_type)
    said = str(error.value)
    assert said.startswith(text) and "\n" not in said
    return said


@pytest.mark.parametrize(
    "text, expected",
    {
        "hf://o/n": HubName("o/n"),
        "hf://o/n/m.pth": HubName("o/n", "m.pth"),
        "hf://o/n/sub/m.pth@v1.0": HubName("o/n", "sub/m.pth", "v1.0"),
        "hf://o/n/m.pth@refs/pr/3": HubName("o/n", "m.pth", "refs/pr/3"),
        "hf://o/n@main": HubName("o/n", "", "main"),
        "hf://o/n@refs/pr/3": HubName("o/n", "", "refs/pr/3"),
        # as huggingface_hub writes them
        "hf://o/n@v1.0/sub/m.pth": HubName("o/n", "sub/m.pth", "v1.0"),
        "hf://o/n@refs/pr/3/m.pth": HubName("o/n", "m.pth", "refs/pr/3"),
        "hf://datasets/o/n/a.jsonl": HubName("o/n", "a.jsonl", "", DATA, "datasets/"),
        "hf://models/o/n/a.jsonl": HubName("o/n", "a.jsonl", "", MODEL, "models/"),
    }.items(),
)
def test_a_name_is_taken_apart_and_written_again(text, expected):
    assert parse(text) == expected
    assert parse(str(expected)) == expected


def test_a_name_without_a_kind_is_of_the_kind_that_is_read():
    assert parse("hf://o/n/a", DATA).repo_type == DATA
    assert parse("hf://models/o/n/a", DATA).repo_type == MODEL


NO_NAMES = """
    hf:// hf://o hf://o/ hf://o/n/ hf://o/n//a hf://o/n/../a hf://o/n/a@ hf://o/n@ hf://../n/a hf://o/n/a@../b
    hf://o/n/a@b/.. hf://o/n/a@/etc/passwd hf://o/n@/etc/passwd hf://o/n/a@b//c hf://o/n/a@b/ hf://datasets/o
"""


@pytest.mark.parametrize(
    "text", [*NO_NAMES.split(), "hf://o n/m", "hf://o/n/a\\b", "hf://o/n/a\0", "hf://o/n/" + "a" * 256]
)
def test_what_is_no_name_is_refused(text):
    assert "expected hf://OWNER/NAME/FILE@REVISION" in refused(text)


def test_any_other_text_stays_as_it_is():
    for text in ("", "a.pth", "/tmp/hf:/a", "o/n"):
        assert local_path(text) is text


@pytest.mark.parametrize(
    "path, words",
    {
        "https://huggingface.co/o/n/resolve/main/s/m.pth": "; give hf://o/n/s/m.pth",
        "https://huggingface.co/o/n/blob/v1/m.pth?download=true": "; give hf://o/n/m.pth@v1",
        "https://huggingface.co/datasets/o/d/blob/main/a.jsonl": "; give hf://datasets/o/d/a.jsonl",
        "https://h/a.pth": "; nothing is downloaded but files of the Hugging Face hub",
        "o/n": "; if it is a repository of the Hugging Face hub, give hf://o/n",
        "out/adapter.pth": "",
        "out/run/base": "",
    }.items(),
)
def test_a_path_that_is_not_there_may_be_meant_for_the_hub(path, words):
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f"{path} does not exist{words}")
    assert words or str(error.value).endswith("exist")


def test_a_file_is_downloaded_once(hub):
    path = local_path("hf://o/n/m.pth")
    assert open(path, "rb").read() == CONTENT
    assert path.name == f"hf://o/n/m.pth@{hub.commit}"
    asked = len(hub.log)
    assert local_path(path.name) == path
    assert len(hub.log) == asked  # a commit never changes
    assert local_path("hf://o/n/m.pth@main") == path
    assert len(hub.asked("GET", "/")) == len([one for one in hub.log[:asked] if one[1] == "GET"])


def test_the_only_pth_of_a_repository_needs_no_name(hub):
    assert local_path("hf://o/n").name == f"hf://o/n/m.pth@{hub.commit}"


def test_the_path_keeps_its_name_when_it_is_copied(hub):
    path = local_path("hf://o/n")
    for other in (copy.deepcopy(path), pickle.loads(pickle.dumps(path))):
        assert (other, other.name) == (path, path.name)
    assert dataclasses.replace(Config(load_model=path)).load_model.name == path.name


def test_a_folder_with_shards(hub):
    index = '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    files = {
        "config.json": "{}",
        "model.safetensors.index.json": index,
        "model-1.safetensors": b"1" * 99,
        "model-2.safetensors": b"2" * 99,
        "modeling.py": "raise SystemExit",
        "onnx/a.json": "{}",
    }
    commit = hub.add("o/folder", files)
    folder = local_path("hf://o/folder")
    assert folder.name == f"hf://o/folder@{commit}"
    assert set(os.listdir(folder)) == {*files} - {"modeling.py", "onnx/a.json"}
    asked = len(hub.log)
    assert local_path(folder.name) == folder
    os.remove(os.path.join(folder, "model-2.safetensors"))
    assert os.path.exists(os.path.join(local_path(folder.name), "model-2.safetensors"))
    assert len(hub.log) > asked


@pytest.mark.parametrize("index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{"])
def test_a_folder_whose_index_is_none(hub, index):
    name = "model.safetensors.index.json"
    hub.add("o/folder", {"config.json": "{}", name: index, "model-1.safetensors": b"1" * 99})
    folder = local_path("hf://o/folder")  # whoever reads it says what is wrong
    for text in (folder.name, "hf://o/folder"):
        with pytest.raises(UserError, match=f"{name} .*(damaged|expected a JSON object)"):
            local_path(text)


def test_a_repository_with_several_files_lists_them(hub):
    hub.add("o/two", {"a.pth": b"a", "b.pth": b"b", "notes.txt": "c"})
    assert "it has a.pth, b.pth; name one, such as hf://o/two/a.pth" in refused("hf://o/two")
    said = refused("hf://o/d", DATA)
    assert "a.jsonl, b/b.jsonl; name one, such as hf://o/d/a.jsonl; o/d without hf://" in said
    assert not hub.asked("GET", "resolve")


def test_wrong_names(hub):
    assert "no model repository o/m, or it is private" in refused("hf://o/m/m.pth")
    assert "or write hf://datasets/o/d if" in refused("hf://o/d/a.jsonl")
    assert "no data set o/n, or it" in refused("hf://o/n/m.pth", DATA)
    assert "has no file zzz; it has README.md, m.pth, config.json" in refused("hf://o/n/zzz")
    assert refused("hf://o/n/conifg.json").endswith("has no file conifg.json; it has config.json")
    assert "o/n has no revision mian, but main" in refused("hf://o/n/m.pth@mian")
    assert "has no revision v2" in refused("hf://o/n@v2")


def test_what_may_not_be_read(hub, monkeypatch):
    hub.private["o/n"] = "hf_right"
    assert "hf auth login" in refused("hf://o/n/m.pth")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "hf auth login" in refused("hf://o/n/m.pth")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert open(local_path("hf://o/n/m.pth"), "rb").read() == CONTENT
    tokens = {
        server: {one[3].get("authorization") for one in hub.log if one[0] == server}
        for server in ("endpoint", "large")
    }
    assert tokens["large"] == {None} and "Bearer hf_right" in tokens["endpoint"]
    hub.add("o/gated", {"m.pth": CONTENT})
    hub.gated.add("o/gated")
    said = refused("hf://o/gated/m.pth")
    assert f"is gated: accept its terms at {hub.endpoint}/o/gated, then log in with: hf auth login" in said


def test_an_interrupted_download_goes_on(hub, tmp_path):
    hub.cut = 200_500
    said = refused("hf://o/n/m.pth")
    assert "goes on from what has arrived" in said
    (partial,) = (tmp_path / "cache").rglob("*.incomplete")
    kept = partial.stat().st_size
    assert 0 < kept <= 200_500
    hub.refusal = None
    path = local_path("hf://o/n/m.pth")
    assert open(path, "rb").read() == CONTENT
    ranges = [one[3].get("range") for one in hub.log if one[0] == "large" and one[1] == "GET"]
    assert ranges[0] is None and ranges[-1].startswith(f"bytes={kept}-")
    assert not partial.exists()


def test_bytes_that_are_not_those_of_the_hash_are_not_kept(hub, tmp_path):
    hub.cut = 200_500
    refused("hf://o/n/m.pth")
    hub.refusal = None
    (partial,) = (tmp_path / "cache").rglob("*.incomplete")
    partial.write_bytes(b"x" * partial.stat().st_size)
    assert "arrived damaged" in refused("hf://o/n/m.pth")
    assert open(local_path("hf://o/n/m.pth"), "rb").read() == CONTENT


def test_without_the_hub_the_cache_answers(hub, monkeypatch, capsys):
    path, data = local_path("hf://o/n"), local_path("hf://o/d/a.jsonl", DATA)
    point_at(CLOSED, monkeypatch)
    for text in ("hf://o/n", "hf://o/n/m.pth", "hf://o/n/m.pth@main", path.name):
        assert local_path(text).name == path.name
    assert "can't be reached" in capsys.readouterr().err
    assert local_path("hf://o/d/a.jsonl", DATA) == data
    said = refused("hf://o/n/config.json")
    assert f"{CLOSED} can't be reached" in said and "or give a local path" in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_path("hf://o/n/m.pth") == path
    assert "HF_HUB_OFFLINE is set" in refused("hf://o/n/config.json")


def test_a_broken_hub_is_one_that_is_not_there(hub):
    path = local_path("hf://o/n/m.pth")
    hub.refusal = 503
    assert local_path("hf://o/n/m.pth") == path
    assert "503" in refused("hf://o/n/config.json")


@pytest.mark.parametrize(
    "etag, commit", [("../../../a", "0" * 40), ("a", "../a"), ("a", None), (None, "0" * 40)]
)
def test_an_answer_that_would_leave_the_cache_is_no_hubs(hub, monkeypatch, etag, commit):
    metadata = types.SimpleNamespace(etag=etag, commit_hash=commit, location="", size=1)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: metadata)
    assert "not as a hub does" in refused("hf://o/n/m.pth")


def test_a_file_whose_name_would_leave_the_cache_is_no_hubs(hub):
    hub.add("o/evil", {"../../m.pth": b"a"})
    assert "not as a hub does" in refused("hf://o/evil")


def test_room_on_the_disk_is_looked_at_first(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    said = refused("hf://o/n/m.pth")
    assert "0.3 MB are to be downloaded" in said and "has 0.0 MB left" in said and "set HF_HOME" in said
    assert not hub.asked("GET", "/")


def test_a_disk_that_fills_up(hub, monkeypatch):
    def full(file, chunk):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files_of_hub._Counted, "write", full)
    assert "is full" in refused("hf://o/n/m.pth")


def test_data_with_weights(hub, tmp_path):
    local = tmp_path / "l.jsonl"
    local.write_text('{"text": "l"}\n')
    config = Config(data_file=f"{local}:2,hf://o/d/a.jsonl:0.5,hf://o/d/b/b.jsonl@main", eval_file=str(local))
    config = fetch_inputs(config)
    commit = hub.branches["datasets", "o/d"]["main"]
    assert config.data_file.name == f"{local}:2,hf://o/d/a.jsonl@{commit}:0.5,hf://o/d/b/b.jsonl@{commit}"
    assert config.eval_file == str(local)
    found = sources(config.data_file)
    assert [source.weight for source in found] == [2, 0.5, 1]
    assert [record["text"] for source in found for _, record in source.records()] == ["l", "a", "b"]


@pytest.mark.parametrize(
    "flags",
    [
        {"data_file": "absent.jsonl"},
        {"data_file": "hf://o/d/a.jsonl,absent.jsonl:2"},
        {"data_file": "hf://o/d/a.jsonl", "eval_file": "absent.jsonl"},
        {"load_model": "absent.pth", "data_file": "hf://o/d/a.jsonl"},
    ],
)
def test_nothing_is_downloaded_for_a_run_that_lacks_a_local_file(hub, flags):
    with pytest.raises(UserError, match=r"absent\.(jsonl|pth)"):
        fetch_inputs(Config(**{"load_model": "hf://o/n", **flags}))
    assert not hub.log


@pytest.mark.parametrize(
    "flags",
    [
        ["--tools", "absent.json"],
        ["--template", "absent.jinja"],
        ["--adapter", "absent.pth"],
        ["--load_state", "absent.chat"],
    ],
)
def test_nothing_is_downloaded_for_a_chat_that_lacks_a_local_file(hub, flags, capsys):
    with pytest.raises(SystemExit) as exit:
        chat.main(["--model", "hf://o/n/m.pth", *flags])
    assert exit.value.code == 2 and flags[1] in capsys.readouterr().err
    assert not hub.log


def test_a_run_keeps_the_commit_that_it_began_with(hub, capsys):
    config = Config(load_model="hf://o/n", data_file="hf://o/d/a.jsonl:2")
    began = Config(**pinned_names(config))
    hub.add("o/n", {"m.pth": b"new"})
    hub.add("o/d", {"a.jsonl": '{"text": "new"}\n'}, "datasets")
    assert pinned_names(config, began) == {"load_model": began.load_model, "data_file": began.data_file}
    assert began.load_model.endswith(hub.commit)
    assert not capsys.readouterr().err
    on_branch = Config(load_model="hf://o/n/m.pth@main")
    assert pinned_names(on_branch, began)["load_model"] == began.load_model
    assert "goes on with its commit" in capsys.readouterr().err
    newest = hub.branches["models", "o/n"]["main"]
    assert pin(parse("hf://o/n")).revision == newest != hub.commit
    asked = Config(load_model=f"hf://o/n/m.pth@{newest}")
    assert pinned_names(asked, began)["load_model"] == asked.load_model
    other = Config(load_model="hf://o/n/config.json")
    with pytest.raises(UserError):
        pinned_names(other, began)
