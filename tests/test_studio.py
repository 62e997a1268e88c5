"""The training page's server, without a browser: paths, uploads, settings, runs, jobs, the chat of a run."""

import asyncio
import contextlib
import faulthandler
import fcntl
import gzip
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
import types

import pytest

pytest.importorskip("starlette", reason="NO starlette (the extra test has it): the server is not tested")
pytest.importorskip("uvicorn", reason="NO uvicorn (the extra test has it): the server is not tested")
pytest.importorskip("httpx", reason="NO httpx (the extra test has it): the server is not tested")

from starlette.testclient import TestClient

from demo import serve
from rwkv_miss import UserError
from rwkv_miss.progress import Progress
from src.config.parse import parse, recorded_settings
from src.config.schema import FIELDS
from src.data.tokenizer import load_tokenizer
from src.inference.engine import Engine
from src.serving.app import assemble, make_app
from src.serving.errors import Refused
from src.serving.limits import Limits
from src.serving.program import guard_of
from src.serving.request_parsing import Defaults
from src.serving.served_models import ServedModels
from src.studio import folders, jobs, program, runs
from src.studio.app import Studio
from src.studio.curves import MetricColumns
from src.studio.folders import Folders
from src.studio.jobs import PROGRESS
from src.studio.trial import Mounted, TriedModel
from src.training.run_folder import alone_in, running

from .conftest import ROOT, write_rows
from .serving import LOCAL, Scripted, no_adapters, records

BASE = "rwkv7-reverse.pth"


class Served:
    """The page's server for a folder: .client, .studio, .trial, .folder."""

    def __init__(self, folder, *flags):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        words = ["--train", str(folder), "--models", str(ROOT / "demo"), "--accelerator", "cpu", *flags]
        args = serve.parse(words)
        self.trial = TriedModel(args, Limits(finishing=5, body_bytes=1 << 16))
        operators = program.checked_flags(args.train_flags)
        self.studio = Studio(Folders(args.train, args.models), operators, self.trial, 1000)
        app = make_app(
            self.studio.all(), guard_of(args), False, self.trial.metrics.refused, self.studio.close
        )
        self.client = TestClient(Mounted(app, self.trial), base_url="http://127.0.0.1")

    def get(self, path, status=200):
        reply = self.client.get(path)
        assert reply.status_code == status, reply.text
        return reply.json()

    def post(self, path, status=200, **body):
        reply = self.client.post(path, json=body)
        assert reply.status_code == status, reply.text
        return reply.json()

    def refused(self, path, status, **body):
        return self.post(path, status, **body)["error"]["message"]


@pytest.fixture
def served(tmp_path):
    found = Served(tmp_path / "work")
    with found.client:
        yield found


def eventually(holds, seconds=30):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


def made_run(folder, steps=20, peft="lora", **summary):
    """A folder as a run leaves it, whose losses are 1/step."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"load_model: base.pth\npeft: {peft}\nmicro_bsz: 4\nchosen:\n  micro_bsz: as many as fit\n"
    )
    lines = [{"step": i, "loss": 1 / i, "lr": 0.1} for i in range(1, steps + 1)]
    write_rows(folder / "metrics.jsonl", lines)
    if summary:
        (folder / "run.json").write_text(json.dumps({"steps": steps, "planned_steps": steps, **summary}))
    return folder


def test_the_page_and_its_server_answer_without_a_model(served):
    page = served.client.get("/")
    assert page.status_code == 200 and "frame-src 'self'" in page.headers["content-security-policy"]
    assert served.client.get("/page/style.css").status_code == 200
    assert served.client.get("/page/app.py").status_code == 404
    about = served.get("/studio")
    assert about["folder"] == str(served.folder) and about["limits"] == {"upload_bytes": 1000}
    [model] = served.get("/studio/models")
    assert (model["name"], model["about"]) == (BASE, "RWKV-7, 3 layers, width 96")
    assert served.get("/studio/runs") == [] == served.get("/studio/data")


def test_the_fields_are_those_of_the_settings_table(served):
    fields = {field["name"]: field for field in served.get("/studio/settings")}
    operators = {"proj_dir", "data_cache", "reward_file", "wandb", "init_only", "resume", "num_nodes"}
    operators.add("largest_row")
    assert list(fields) == [name for name in FIELDS if name not in operators]
    # a new setting with a file must say so
    of_files = [name for name in FIELDS if name.endswith(("_file", "_dir", "_cache", "_model", "_adapter"))]
    assert all(name in operators or fields[name]["file"] for name in of_files) and len(of_files) > 5
    assert fields["beta1"]["below"] == 1 and fields["beta1"]["type"] == "float"
    assert "miss" in fields["peft"]["choices"]
    assert fields["lr_init"]["automatic"] and fields["lr_init"]["words"] == ["auto", "paper"]
    assert fields["load_model"]["file"] and not fields["loss"]["file"]


@pytest.mark.parametrize(
    "name, text",
    [
        ("load_model", "/etc/passwd"),
        ("load_model", "../outside.pth"),
        ("load_model", "link.pth"),
        ("data_file", "link.pth:2"),
        ("eval_file", f"{ROOT}/README.md"),
        ("template", "train.py"),
        ("tokenizer", "LICENSE"),  # a word, but also a file where the run is started
        ("init_adapter", "nul\0"),
        ("load_model", "0"),  # the newest of a folder, to train.py
    ],
)
def test_only_files_in_the_named_folders_may_be_named(served, name, text):
    (served.folder.parent / "outside.pth").write_text("x")
    (served.folder / "link.pth").symlink_to(served.folder.parent / "outside.pth")
    said = served.refused("/studio/command", 400, settings={name: text})
    assert said.startswith(f"{name}: ") and "choose a file there" in said
    assert served.refused("/studio/jobs", 400, kind="plan", settings={name: text}) == said
    assert served.refused("/studio/runs", 400, name="a", settings={name: text}) == said
    assert not (served.folder / "runs").exists()


def test_no_answer_tells_whether_something_is_outside(served, tmp_path):
    """Links before .. were followed, those outside too."""
    (served.folder / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/away")
    for name, status in (("work/a.jsonl", 200), ("a.jsonl", 400)):
        replies = set()
        for outside in ("absent", "link", "far"):
            reply = served.post("/studio/command", status, settings={"data_file": f"../{outside}/../{name}"})
            replies.add(json.dumps(reply).replace(f"../{outside}/..", ""))
        assert len(replies) == 1


def test_a_model_that_is_named_alone_is_looked_at(served):
    assert served.post("/studio/models", name=BASE) == {"path": str(ROOT / "demo" / BASE)}
    assert served.post("/studio/models", name="hf://a/b") == {"path": "hf://a/b"}
    (served.folder / "rows.pth").write_text("{}")
    assert "rows.pth" in served.refused("/studio/models", 400, name="rows.pth")
    assert "choose a file there" in served.refused("/studio/models", 400, name="/etc/passwd")
    assert served.refused("/studio/data?name=rows.docx", 400).startswith("'rows.docx' is no file of data")


@pytest.mark.parametrize("text", ["\0", "\ud800", "x" * 40_000])
def test_a_text_that_no_command_line_can_have_is_refused_before_a_run_is_made(served, text):
    (served.folder / "rows.jsonl").write_text('{"text": "a"}\n')
    settings = {"load_model": BASE, "data_file": "rows.jsonl", "reward_regex": text}
    body = json.dumps({"name": "a", "settings": settings})
    reply = served.client.post("/studio/runs", content=body)
    assert reply.status_code == 400 and "no command line can have" in reply.text
    assert not (served.folder / "runs").exists()


@pytest.mark.parametrize("name", ["proj_dir", "reward_file", "data_cache", "wandb", "resume"])
def test_what_runs_code_or_names_a_place_is_the_operators(served, name):
    said = served.refused("/studio/command", 400, settings={name: "x"})
    assert "only the operator sets it" in said
    assert "did you mean" in served.refused("/studio/command", 400, settings={"micro_bzs": "1"})
    reply = served.client.post("/studio/command", json={"settings": {}, "rum": "a"})
    assert reply.headers["x-ignored-fields"] == "rum"


def test_the_command_is_the_one_of_a_terminal(tmp_path):
    served = Served(tmp_path / "work", "--train_flags", "--reward_file r.py --save_steps 50")
    (served.folder / "data").mkdir()
    (served.folder / "data/a b.jsonl").write_text("{}\n")
    settings = {"load_model": BASE, "data_file": "data/a b.jsonl:2", "lr_final": "-1", "tokenizer": "bytes"}
    found = served.post("/studio/command", settings={**settings, "ctx_len": 64}, run="first")
    assert found["problem"] is None and found["name"] == "runs/first"
    config = parse(shlex.split(found["command"])[2:])
    assert config.load_model == str(ROOT / "demo" / BASE) and config.save_steps == 50
    assert config.data_file == f"{served.folder}/data/a b.jsonl:2" and config.ctx_len == 64
    assert config.proj_dir == str(served.folder / "runs/first") and config.lr_final == -1
    problem = served.post("/studio/command", settings={**settings, "beta1": "2"})["problem"]
    assert problem.startswith("--beta1 2.0: must be")
    # the operator's file of rewards is for grpo alone, and the page may set what is no operator's
    on_rewards = served.post("/studio/command", settings={"loss": "grpo", "save_steps": "9"})["command"]
    assert "--reward_file r.py" in on_rewards and "--save_steps 9 " in on_rewards
    assert "r.py" not in found["command"] and served.get("/studio")["train_flags"][0] == "--reward_file=r.py"


def test_flags_of_the_operator_that_do_not_exist_end_the_start(tmp_path):
    with pytest.raises(UserError, match="did you mean --reward_file"):
        program.checked_flags("--reward_fil r.py")
    with pytest.raises(UserError, match="--models /nowhere is no folder"):
        Folders(str(tmp_path / "work"), ["/nowhere"])
    assert not os.listdir(tmp_path)
    with pytest.raises(UserError, match="--train /dev/null/work: no folder can be made there"):
        Folders("/dev/null/work")


def test_without_locks_of_files_the_start_is_refused(monkeypatch):
    """On Windows no run would ever be seen as alive."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "fcntl" and find_spec(name) or None)
    with pytest.raises(UserError, match="--train needs locks of files"):
        serve.parse(["--train", "."])


def test_an_upload_never_overwrites_and_leaves_nothing_if_it_fails(served):
    def send(name, body):
        return served.client.post("/studio/data", params={"name": name}, content=body)

    data = served.folder / "data"
    assert send("../a b.jsonl", b"one").json()["path"] == str(data / "a-b.jsonl")
    assert send("a b.JSONL", b"two").json()["name"] == "data/a-b-2.jsonl"
    assert (data / "a-b.jsonl").read_bytes() == b"one"
    four = "\U00010400"  # bytes, and a name has at most 255
    long = send(four * 80 + ".jsonl", b"long")
    assert long.status_code == 200 and long.json()["name"] == f"data/{four * 50}.jsonl"
    os.remove(long.json()["path"])
    assert send("a.jsonl", b"x" * 1001).status_code == 413
    assert send("a.jsonl", iter([b"x" * 600, b"x" * 600])).status_code == 413  # without its length
    for name, body in (
        ("a.py", b"x"),
        (".jsonl", b"x"),
        ("", b"x"),
        ("config.JSON", b"x"),
        ("a.bin", b"x"),
        ("a.csv", b""),
    ):
        assert send(name, body).status_code == 400, name
    assert sorted(os.listdir(data)) == ["a-b-2.jsonl", "a-b.jsonl"]
    assert [file["bytes"] for file in served.get("/studio/data")] == [3, 3]


def trickling(parts):
    """A request whose body comes in parts of `bytes` after `seconds`."""

    async def stream():
        for size, seconds in parts:
            await asyncio.sleep(seconds)
            yield b"x" * size

    return types.SimpleNamespace(headers={}, stream=stream)


@pytest.mark.parametrize(
    "parts",
    [[(1, 0.05)] * 40, [(100_000, 0)] + [(1, 0.05)] * 40, [(1, 0), (1, 9)]],
    ids=["drops", "a burst, then drops", "silence"],
)
def test_an_upload_that_trickles_is_closed(tmp_path, parts):
    """Each byte gave it new time, so a few slow clients held all places."""
    began = time.monotonic()
    with pytest.raises(Refused, match="too slowly: at least 16 KiB a second after 0.5 seconds") as error:
        asyncio.run(Folders(str(tmp_path)).receive(trickling(parts), "a.jsonl", 1 << 20, 0.5))
    assert (error.value.status, error.value.headers) == (408, {"Connection": "close"})
    assert time.monotonic() - began < 1.8 and not os.listdir(tmp_path / "data")


def test_an_upload_that_keeps_coming_may_take_long(tmp_path):
    parts = [(8192, 0.1)] * 10  # each has half a second's bytes
    sent = asyncio.run(Folders(str(tmp_path)).receive(trickling(parts), "a.jsonl", 1 << 20, 0.5))
    assert sent["bytes"] == 81920


def test_lists_have_each_file_once_and_none_that_cannot_be_read(served):
    """A Hugging Face data set may have a config.json; a model's folder is no data."""
    for name in ("data/rows.jsonl", "data/a.csv.gz", "set/train.jsonl", "set/config.json", "data/alone.bin"):
        (served.folder / name).parent.mkdir(exist_ok=True)
        (served.folder / name).write_text("x")
    made_run(served.folder / "runs/a")
    (served.folder / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (served.folder / "model" / name).write_text("{}")
    (served.folder / "broken.jsonl").symlink_to("nowhere")
    (served.folder / "again.jsonl").symlink_to("data/rows.jsonl")
    served.studio.folders.others.append(str(served.folder / "data"))
    names = [file["name"] for file in served.get("/studio/data")]
    assert sorted(names) == ["data/a.csv.gz", "data/rows.jsonl", "set/train.jsonl"]


def test_a_folder_of_data_has_no_link_that_leads_out(served):
    (served.folder / "set").mkdir()
    (served.folder / "set/a.jsonl").symlink_to(ROOT / "README.md")
    said = served.refused("/studio/command", 400, settings={"data_file": "set:2"})
    assert said.startswith(f"data_file: {served.folder}/set/a.jsonl is a link that leads out of ")


def test_many_files_in_runs_hide_no_other_run(served, monkeypatch, capsys):
    monkeypatch.setattr(folders, "MOST_FOLDERS", 6)
    for i in range(9):
        (made_run(served.folder / "a") if not i else served.folder / "a").joinpath(f"sub{i}").mkdir()
    made_run(served.folder / "b")
    assert {run["name"] for run in served.get("/studio/runs")} == {"a", "b"}
    for i in range(9):
        (served.folder / f"c{i}").mkdir()
    for _ in range(2):
        served.get("/studio/runs")
    assert capsys.readouterr().err.count("has more folders than 6") == 1


def test_what_a_killed_server_left_of_an_upload_is_removed(served):
    (served.folder / "data").mkdir()
    for name, age in (("old", 9999), ("new", 0)):
        (served.folder / f"data/.upload-{name}.tmp").write_text("x")
        os.utime(served.folder / f"data/.upload-{name}.tmp", (time.time() - age,) * 2)
    Folders(str(served.folder))
    assert os.listdir(served.folder / "data") == [".upload-new.tmp"]


def test_uploaded_files_are_no_run(served):
    """Else its settings would be a stranger's."""
    for name in ("studio.json", "running.json"):
        served.client.post("/studio/data", params={"name": name}, content=b"{}")
    assert served.get("/studio/runs") == []
    assert served.refused("/studio/runs/data/resume", 404)


def test_a_run_of_a_terminal_is_found_with_its_state(served):
    made_run(served.folder / "done", verdict={"name": "learnt"})
    made_run(served.folder / "deep/in/stopped", planned_steps=40)
    made_run(served.folder / "killed")
    runs = {run["name"]: run for run in served.get("/studio/runs")}
    assert {name: run["state"] for name, run in runs.items()} == {
        "done": "done",
        "deep/in/stopped": "stopped",
        "killed": "failed",
    }
    stopped = runs["deep/in/stopped"]
    assert (stopped["step"], stopped["steps"], stopped["peft"]) == (20, 40, "lora")
    assert stopped["can_resume"] and not runs["done"]["can_resume"]
    run = served.get("/studio/runs/deep/in/stopped?from=2&to=4")
    assert run["curves"]["step"] == [2, 3, 4] and run["curves"]["loss"][0] == 0.5
    assert run["chosen"] == {"micro_bsz": {"value": 4, "why": "as many as fit"}}
    assert run["settings"] == {"load_model": "base.pth", "peft": "lora"}
    assert run["verdict"] is None and served.get("/studio/runs/done")["verdict"] == {"name": "learnt"}
    assert "expected a number" in served.get("/studio/runs/done?points=nan", 400)["error"]["message"]
    assert len(served.get("/studio/runs/done?points=-1")["curves"]["step"]) <= 10
    served.refused("/studio/runs/killed/stop", 409)
    # the run's base is not in the folders that were named
    assert served.refused("/studio/runs/killed/resume", 400).startswith("load_model: ")


@pytest.mark.parametrize(
    ("settings", "merge", "export"),
    [
        (f"load_model: {BASE}", "", "GGUF: an RWKV-7 with heads of 32 would load"),
        (f"load_model: {BASE}\npeft: state", "", "has an initial state (att.time_state"),
        ("load_model: gone.pth", "'gone.pth' is not in ", "'gone.pth' is not in "),
        ("peft: none", "trains a new model, which has no base", ""),
    ],
)
def test_what_cannot_be_written_of_a_run_has_its_reason(served, settings, merge, export):
    pytest.importorskip("gguf", reason="NO gguf (the extra export has it): its reasons are not tested")
    run = made_run(served.folder / "a", verdict={"name": "learnt"})
    (run / "config.yaml").write_text(settings)
    blocked = served.get("/studio/runs/a")["blocked"]
    for name, text in (("merge", merge), ("export", export)):
        assert text in blocked[name] and bool(text) == bool(blocked[name]), blocked


@pytest.mark.parametrize("name", ["a/../../b", "../b", "%00", "nothing", "a/link"])
def test_no_other_folder_is_a_run(served, name):
    made_run(served.folder.parent / "b")
    made_run(served.folder / "a")
    (served.folder / "a/link").symlink_to(served.folder.parent / "b")
    assert served.client.get(f"/studio/runs/{name.replace('/', '%2F')}").status_code == 404


def test_only_files_right_in_the_runs_folder_are_sent(served):
    run = made_run(served.folder / "a")
    (run / "adapter.pth").write_bytes(b"tensors")
    (run / "out.md").symlink_to("/etc/passwd")
    reply = served.client.get("/studio/runs/a/files/adapter.pth")
    assert reply.content == b"tensors" and reply.headers["content-disposition"].startswith("attachment")
    for name in ("out.md", "..%2Fdata", "%2Fetc%2Fpasswd", "no.pth", "tensorboard"):
        assert served.client.get(f"/studio/runs/a/files/{name}").status_code == 404, name
    assert [file["name"] for file in served.get("/studio/runs/a")["files"]] == [
        "metrics.jsonl",
        "config.yaml",
        "adapter.pth",
    ]


def test_a_second_start_in_a_folder_is_refused_with_the_reason(served):
    (served.folder / "rows.jsonl").write_text('{"text": "a"}\n')
    settings = {"load_model": BASE, "data_file": "rows.jsonl"}
    made_run(served.folder / "runs/old")
    said = served.refused("/studio/runs", 409, name="old", settings=settings)
    assert said == "runs/old holds files of another run; choose another name"
    with alone_in(str(served.folder / "runs/new")):
        said = served.refused("/studio/runs", 409, name="new", settings=settings)
        assert said == "runs/new is in use by a run; choose another name"
    # a process that has its log, and not yet the folder
    log = open(served.folder / "runs/old/train.log", "ab")
    fcntl.flock(log, fcntl.LOCK_EX)
    assert served.get("/studio/runs/runs/old")["state"] == "starting"
    (served.folder / "runs/old/studio.json").write_text('{"started": 1, "stopped": 2}')
    assert served.get("/studio/runs/runs/old")["state"] == "stopping"
    assert "is in use by a run" in served.refused("/studio/runs/runs/old/resume", 409)
    for name in ("", "../a", "a/b", ".a", "a" * 90, "\U00010400" * 80):
        assert (
            served.client.post("/studio/runs", json={"name": name, "settings": settings}).status_code == 400
        )


@pytest.mark.slow
def test_a_run_with_a_chinese_name_goes_through_whole(served):
    rows = "".join(json.dumps({"text": f"User: {i}\n\nAssistant: 好"}) + "\n" for i in range(4))
    data = served.client.post("/studio/data?name=数据.jsonl", content=rows.encode()).json()
    assert data["name"] == "data/数据.jsonl"
    short = {"epoch_count": "1", "epoch_steps": "1", "micro_bsz": "1", "ctx_len": "32", "lr_init": "0.001"}
    settings = {"load_model": BASE, "data_file": data["path"], "peft_config": '{"r": 4}', **short}
    assert served.post("/studio/runs", 201, name="第一次", settings=settings) == {"name": "runs/第一次"}
    path = "/studio/runs/runs/第一次"
    eventually(lambda: served.get("/studio/runs")[0]["state"] in ("done", "failed"), 120)
    run = served.get(path)
    assert (run["state"], run["name"], run["curves"]["step"]) == ("done", "runs/第一次", [1]), run["log"]
    assert run["verdict"]["sentence"] and "第一次" in run["command"]
    (listed,) = served.get("/studio/runs")
    assert listed["name"] == "runs/第一次"
    job = served.post("/studio/jobs", kind="merge", run="runs/第一次")["id"]
    eventually(lambda: served.get(f"/studio/jobs/{job}")["state"] != "running", 60)
    assert served.get(f"/studio/jobs/{job}")["result"]["file"] == "merged.pth"
    names = {file["name"] for file in served.get(path)["files"]}
    assert {"merged.pth", "adapter.pth", "run_card.md"} <= names
    merged = (served.folder / "runs" / "第一次" / "merged.pth").read_bytes()
    assert served.client.get(f"{path}/files/merged.pth").content == merged
    assert served.post(f"{path}/try")["run"] == "runs/第一次"
    eventually(lambda: served.get("/studio/try")["state"] != "loading", 60)
    assert served.get("/studio/try")["state"] == "ready", served.get("/studio/try")
    question = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 2}
    reply = served.post("/try/v1/chat/completions", **question, model="base:adapter")
    assert reply["choices"][0]["message"]["role"] == "assistant"


def test_a_run_that_has_ended_is_not_resumed(served):
    made_run(served.folder / "a", verdict={"name": "learnt"})
    assert served.refused("/studio/runs/a/resume", 409) == "a has ended; start a new run for more steps"


def test_a_run_that_was_killed_resumes_with_what_was_typed(served, monkeypatch):
    commands = []
    monkeypatch.setattr(
        jobs, "start", lambda words, *log: commands.append(words) or types.SimpleNamespace(pid=7)
    )
    (served.folder / "rows.jsonl").write_text('{"text": "a"}\n')
    settings = {"load_model": BASE, "data_file": "rows.jsonl", "lr_init": "6e-3"}
    assert served.post("/studio/runs", 201, name="first", settings=settings) == {"name": "runs/first"}
    assert served.get("/studio/runs/runs/first")["state"] == "failed"  # nobody has locked the log
    other = Served(served.folder)  # a new server knows nothing but the folder
    other.post("/studio/runs/runs/first/resume")
    first, second = commands
    assert second == [*first, "--resume=auto"] and "--lr_init=6e-3" in first
    assert other.get("/studio/runs/runs/first")["settings"] == settings


def test_children_that_outlive_their_run_are_stopped(served):
    run = made_run(served.folder / "a")
    with open(run / "train.log", "ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        leader = subprocess.Popen(["sh", "-c", "sleep 600 &"], stdout=log, start_new_session=True)
    leader.wait()
    assert served.get("/studio/runs/a")["can_stop"]
    assert "says which process" in served.refused("/studio/runs/a/stop", 409)
    (run / "studio.json").write_text(json.dumps({"pid": leader.pid}))
    served.post("/studio/runs/a/stop")
    eventually(lambda: not served.get("/studio/runs/a")["can_stop"])


@pytest.mark.parametrize("room", [0, 300, None])
def test_a_full_disk_starts_no_run_and_leaves_nothing(served, monkeypatch, room):
    """None: the disk is full as soon as the process has started."""
    resource = pytest.importorskip("resource", reason="Windows has no limit of a file's size")
    limits, started = resource.getrlimit(resource.RLIMIT_FSIZE), []

    def full(room):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))

    def start(words, *log):
        started.append(subprocess.Popen(["sleep", "60"], start_new_session=True))
        full(0)
        return started[0]

    monkeypatch.setattr(jobs, "start", start)
    (served.folder / "rows.jsonl").write_text('{"text": "a"}\n')
    settings = {"load_model": BASE, "data_file": "rows.jsonl"}
    try:
        if room is not None:
            full(room)
        said = served.refused("/studio/runs", 507, name="a", settings=settings)
    finally:
        full(limits[0])
    assert "runs/a was not started: " in said and "File too large" in said
    assert not (served.folder / "runs/a").exists()
    assert [process.wait(20) for process in started] == ([-9] if room is None else [])
    assert served.get("/studio/runs") == []


def test_runs_of_another_server_count(served, monkeypatch):
    (served.folder / "rows.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setattr(runs, "AT_ONCE", 1)
    with open(made_run(served.folder / "a") / "train.log", "ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        settings = {"load_model": BASE, "data_file": "rows.jsonl"}
        assert "1 runs are going" in served.refused("/studio/runs", 429, name="b", settings=settings)


def test_one_bad_folder_does_not_hide_the_other_runs(served):
    made_run(served.folder / "good")
    for name, text in (("summary", '{"steps": "x"}'), ("list", "[]"), ("steps", '{"steps": 1e999}')):
        (made_run(served.folder / name) / "run.json").write_text(text)
    (made_run(served.folder / "started") / "studio.json").write_text('{"settings": [], "started": "x"}')
    (made_run(served.folder / "line") / "validation.jsonl").write_text('{"step": 1}\n')
    assert {"good", "list"} <= {run["name"] for run in served.get("/studio/runs")}


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "validation.jsonl", "run.json", "running.json", "studio.json", "train.log"]
)
def test_a_pipe_in_the_place_of_a_runs_file_is_not_waited_for(served, name):
    run = made_run(served.folder / "a")
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    with ended_after(20):
        assert len(served.get("/studio/runs")) == 1
        assert served.get("/studio/runs/a")["name"] == "a"
        if name == "train.log":
            with pytest.raises(Refused, match="train.log can't be written: .*; remove it"):
                runs.lock_log(str(run))


def test_a_folder_that_does_not_answer_ends_its_request_and_no_other(served, monkeypatch):
    """As a disk of another machine does. A terminal's run is read again by the next request."""
    made_run(served.folder / "a")
    names, go = served.studio.folders.runs, threading.Event()
    served.studio.duty.seconds = 0.3
    monkeypatch.setattr(served.studio.folders, "runs", lambda: go.wait(60) and names())
    try:
        assert "it took more than 0.3 seconds" in served.get("/studio/runs", 503)["error"]["message"]
        monkeypatch.setattr(served.studio.folders, "runs", names)
        assert [run["name"] for run in served.get("/studio/runs")] == ["a"]
        assert served.get("/studio/runs/a")["step"] == 20
    finally:
        go.set()


def test_a_run_is_read_by_one_request_at_a_time(served, monkeypatch):
    run = runs.Run("a", str(made_run(served.folder / "a")))
    begun, go, update = threading.Event(), threading.Event(), run.metrics.update
    monkeypatch.setattr(run.metrics, "update", lambda: (begun.set(), go.wait(20), update()))
    with open(run.metrics.path, "a") as file:
        file.write('{"step": 21, "loss": 0.1}\n')
    slow = threading.Thread(target=run.update)
    slow.start()
    assert begun.wait(20)
    run.update()  # another request reads the line
    assert run.step == 20
    go.set()
    slow.join(20)
    assert run.step == 21 and len(run.metrics.thinned(100, 0, 99)["loss"]) == 21


@contextlib.contextmanager
def ended_after(seconds):
    """End this process if the block takes longer: a thread that opens a pipe can't be ended alone."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


TOO_LONG = "9" * 400
STRANGE_FILES = [
    ("config.yaml", "[" * 100_000),
    ("config.yaml", "".join(f"k{i}: 1\n" for i in range(6000))),
    ("config.yaml", "wandb: " + "x" * (1 << 17)),
    ("config.yaml", "peft_config: {a: &a [1, 1], b: [*a, *a]}"),
    ("config.yaml", "peft_config: {r: !!binary aGk=}"),
    ("config.yaml", "wandb: !!bool foo"),
    ("config.yaml", 'micro_bsz: !!int ""'),
    ("config.yaml", f"lr_init: 1{':0' * 180}.5"),
    ("config.yaml", "peft_config: {when: 2020-01-01, r: .nan}"),
    ("config.yaml", "chosen: [1]"),
    ("config.yaml", "chosen: {lr_init: 2020-01-01, peft: [.nan]}"),
    ("config.yaml", f"micro_bsz: {'9' * 5000}"),
    ("metrics.jsonl", f'{{"step": {TOO_LONG}, "loss": 1}}\n{{"step": 1, "loss": {TOO_LONG}}}\n'),
    ("metrics.jsonl", '{"step": 1, "loss": %s}\n' % ("[" * 100_000)),
    ("validation.jsonl", '{"step": "x", "loss": 1}\n'),
    ("validation.jsonl", '{"step": 1}\n'),
    ("validation.jsonl", '{"step": 1, "loss": 1, "samples": %s}\n' % ("[" * 400 + "]" * 400)),
    ("run.json", '{"steps": "x", "plan": 1}'),
    ("run.json", '{"steps": 3, "best_step": 1, "best": 7}'),
    ("run.json", '{"steps": 1e999}'),
    ("run.json", '{"verdict": %s}' % ("[" * 900 + "]" * 900)),
    ("running.json", f'{{"pid": {TOO_LONG}, "steps": {TOO_LONG}}}'),
    ("studio.json", '{"settings": "abc", "started": "x", "words": "abc"}'),
    ("studio.json", '{"settings": {"load_model": 5}, "words": [1], "stopped": {}}'),
    ("studio.json", '{"started": NaN, "pid": %s}' % ("9" * 19)),
    ("studio.json", "[" * 100_000),
]


@pytest.mark.parametrize("name, text", STRANGE_FILES, ids=range(len(STRANGE_FILES)))
def test_a_runs_file_with_anything_in_it_is_read_once_and_stops_no_list(served, monkeypatch, name, text):
    read = []
    monkeypatch.setattr(runs, "recorded_settings", lambda path: read.append(path) or recorded_settings(path))
    run = made_run(served.folder / "a")
    (run / name).write_text(text)
    for _ in range(2):
        assert [run["name"] for run in served.get("/studio/runs")] == ["a"]
        json.dumps(served.get("/studio/runs/a"), allow_nan=False)
    assert len(read) == 1
    served.refused("/studio/runs/a/stop", 409)
    served.refused("/studio/runs/a/resume", 400)
    served.refused("/studio/jobs", 409, kind="merge", run="a")


def test_running_json_is_there_while_the_lock_is_held(tmp_path, monkeypatch):
    def of_another_user(pid, number):
        raise PermissionError

    folder = str(tmp_path / "run")
    with alone_in(folder):
        assert running(folder)["pid"] == os.getpid()
        shutil.copy(f"{folder}/running.json", tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "kill", of_another_user)
            assert running(folder)["pid"] == os.getpid()
    assert not os.path.exists(folder)
    os.mkdir(folder)
    shutil.copy(tmp_path / "running.json", folder)  # as a run leaves it that was killed
    assert running(folder) is None
    shutil.copy(tmp_path / "running.json", folder)
    monkeypatch.setattr(os, "kill", of_another_user)
    assert running(folder) is None  # the number of its process is another user's by now
    (tmp_path / "run/running.json").write_text('{"pid": "x"}')
    assert running(folder) is None


def test_only_what_is_new_is_read_of_a_growing_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricColumns(str(path))
    metrics.update()
    assert metrics.last("step") is None
    path.write_text('{"step": 1, "loss": 2.5}\nbroken\n{"step": 2, "loss": null, "kl": 1}\n{"step": 3, "lo')
    metrics.update()
    assert metrics.thinned(9, 0, 9) == {
        "step": [1, 2],
        "loss": [2.5, None],
        "kl": [None, 1],
        "mean": [2.5, None],
    }
    offset = metrics.offset
    with open(path, "a") as file:
        file.write('ss": 4}\n')
    metrics.update()
    assert metrics.offset > offset and metrics.last("loss") == 4
    replaced = tmp_path / "other"  # as by a run that resumes from a checkpoint
    replaced.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 7}\n' + " " * 99 + "\n")
    os.replace(replaced, path)
    metrics.update()
    assert metrics.last("step") == 2 and metrics.last("loss") == 7


def test_a_long_run_is_thinned_and_keeps_its_peaks(tmp_path):
    path = tmp_path / "metrics.jsonl"
    losses = {i: 1.0 for i in range(1, 20001)} | {777: 9.0, 8000: 0.5}
    path.write_text("".join(f'{{"step": {i}, "loss": {loss}}}\n' for i, loss in losses.items()))
    metrics = MetricColumns(str(path))
    metrics.update()
    curves = metrics.thinned(100, 0, 1e9)
    found = dict(zip(curves["step"], curves["loss"]))
    assert len(found) <= 100 and found[777] == 9 and found[8000] == 0.5 and {1, 20000} <= set(found)
    assert curves["mean"][curves["step"].index(777)] == pytest.approx(1 + 8 / 200)


def test_requests_of_other_pages_are_refused(served):
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"}):
        reply = served.client.post("/studio/runs", json={"name": "a"}, headers=headers)
        assert reply.status_code == 403, headers
    reply = served.client.post("/studio/runs", content=b"x" * 100_000)
    assert reply.status_code == 413


def test_the_key_guards_the_page_and_its_chat(tmp_path):
    served = Served(tmp_path / "work", "--api_key", "secret")
    served.trial.app = chat("Hello.", guard_of(served.trial.args))
    for path in ("/studio", "/studio/runs", "/try/v1/models"):
        assert served.client.get(path).status_code == 401, path
        assert served.client.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200, path
    for path in ("/", "/page/style.css", "/try/", "/try/page/style.css"):
        assert served.client.get(path).status_code == 200, path


def test_an_admins_key_guards_what_changes_something(tmp_path):
    for name in ("keys", "admins"):
        (tmp_path / name).write_text(f"of-{name}")
    keys = ["--api_key_file", str(tmp_path / "keys"), "--admin_key_file", str(tmp_path / "admins")]
    served = Served(tmp_path / "work", *keys)
    for key, status in (("of-keys", 403), ("of-admins", 404)):
        headers = {"Authorization": f"Bearer {key}"}
        assert served.client.get("/studio/runs", headers=headers).status_code == 200
        reply = served.client.post("/studio/runs/a/stop", headers=headers)
        assert reply.status_code == status
        assert status == 404 or "only an admin's key may change something" in reply.text


def chat(script, guard=LOCAL):
    tokenizer = load_tokenizer("bytes", 256)
    engine = Engine(Scripted(4, script), tokenizer, chunk=64, reads_first=False)
    engine_served = ServedModels("base", no_adapters(), records(tokenizer), 1.0, None)
    return assemble(engine, engine_served, Defaults(64, "", {}, 0), Limits(), guard)[0]


def test_the_chat_is_below_try(served):
    assert served.get("/studio/try") == {"state": "none", "run": None, "error": None}
    assert served.client.get("/try/").status_code == 404
    served.trial.app = chat("Hello.")
    assert served.get("/try/v1/models")["data"][0]["id"] == "base"
    assert 'src="page/app.js"' in served.client.get("/try/").text
    assert "frame-ancestors 'self'" in served.client.get("/try/").headers["content-security-policy"]
    assert served.client.get("/tryout").status_code == 404
    made_run(served.folder / "a")
    assert "no trained file" in served.refused("/studio/runs/a/try", 409)
    assert "no trained file" in served.refused("/studio/jobs", 409, kind="merge", run="a")


def test_a_trial_that_cannot_be_loaded_says_so_and_a_next_one_may_be(served, monkeypatch, capsys):
    asked = []

    def load(args):
        asked.append((os.path.basename(args.model), args.adapters))
        raise KeyError("blocks.0")

    monkeypatch.setattr("src.serving.program.load", load)
    folder = made_run(served.folder / "a", peft="none", best="best.pth", best_step=10)
    for name in ("best.pth", "model.pth"):
        (folder / name).write_bytes(b"x")
    for _ in range(2):
        served.post("/studio/runs/a/try")
        eventually(lambda: served.get("/studio/try")["state"] != "loading")
        assert served.get("/studio/try") == {"state": "failed", "run": "a", "error": "KeyError: 'blocks.0'"}
    assert "KeyError" in capsys.readouterr().err
    assert asked == [("best.pth", {})] * 2  # the best state of a whole training is a model, too


def test_a_server_that_ends_takes_no_new_answers_of_the_trial(served):
    served.trial.dispatcher = types.SimpleNamespace(closing=False, worker=types.SimpleNamespace(fatal=None))
    served.trial.closing = True
    assert served.trial.dispatcher.closing
    served.trial.dispatcher = None


def test_progress_is_read_from_a_programs_line():
    bar = Progress("downloading hf://a/b/c.pth", 3000, "MB")
    bar.update(1500)
    found = PROGRESS.match(bar.text(2.0))
    assert found["text"] == "downloading hf://a/b/c.pth" and found["done"] == "1,500"
    assert PROGRESS.match(Progress("reading", unit="files").text(2.0)) is None


def test_jobs_are_bounded_end_and_are_no_zombies(served, monkeypatch):
    def start(words, out, err):
        return start_process(["-c", "import time; print('{}', flush=True); time.sleep(60)"], out, err)

    start_process = jobs.start
    monkeypatch.setattr(jobs, "start", start)
    names = [served.studio.jobs.start("plan", [])["id"] for _ in range(jobs.AT_ONCE)]
    assert "jobs are running" in served.refused("/studio/jobs", 429, kind="preview", settings={})
    assert served.get(f"/studio/jobs/{names[0]}")["state"] == "running"
    process = served.studio.jobs.by_id[names[0]].process
    served.client.delete(f"/studio/jobs/{names[0]}")
    eventually(lambda: not os.path.exists(f"/proc/{process.pid}"))  # a zombie would stay there
    ended = served.get(f"/studio/jobs/{names[0]}")
    assert ended["state"] == "failed" and ended["error"] == "ended with -15" and ended["result"] is None
    served.get("/studio/jobs/nothing", 404)
    assert "expected hf://" in served.refused("/studio/jobs", 400, kind="fetch", name="/etc/passwd")
    for name in ("hf://a/b/\0.pth", "hf://a", "hf://a/b/../c.pth", f"hf://a/b/{'x' * 300}.pth"):
        assert "expected hf://" in served.refused("/studio/jobs", 400, kind="fetch", name=name)
    run = made_run(served.folder / "a")
    (run / "adapter.pth").write_bytes(b"tensors")
    (run / "config.yaml").write_text('load_model: "hf://a/b/\\0.pth"\n')
    said = served.refused("/studio/jobs", 400, kind="merge", run="a")
    assert "no command line can have" in said
    served.studio.jobs.close()


@pytest.mark.parametrize("room, code", [(60, 2), (600, 0)])
def test_a_preview_has_a_limit_of_memory(tmp_path, room, code):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(gzip.compress(json.dumps({"text": "a b " * 480_000}).encode()))
    program = f"from src.studio import job; job.ROOM, job.OF_A_BYTE = {room} << 20, 10; job.main()"
    words = ["scripts.preview", "--json", f"--load_model={ROOT}/demo/{BASE}", f"--data_file={rows}"]
    words = [sys.executable, "-c", program, *words, "--samples", "10", "--largest_row=2"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.endswith("error: memory ran out\n") == bool(code)


def test_refused_flags_leave_no_folder(tmp_path):
    args = serve.parse(["--train", str(tmp_path / "work"), "--port", "0", "--train_flags=--reward_fil x"])
    with pytest.raises(UserError, match="did you mean --reward_file"):
        program.run(args)
    assert not (tmp_path / "work").exists()
