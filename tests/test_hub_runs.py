"""Runs from names of the hub: one download for all processes, one commit for the whole run, and its card."""

import dataclasses
import functools
import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard, constants

import rwkv_miss
from rwkv_miss import UserError, read_checkpoint, read_metadata
from rwkv_miss.files.checkpoint import write_checkpoint
from src.config import Config, settle
from src.data.fetch import fetch_inputs
from src.data.recorded_tokenizer import recorded_tokenizer
from src.reporting.model_card import WRITTEN, model_card, write_model_card

from . import program
from .conftest import read_rows, save_base
from .hub_server import serving
from .program import losses, succeed
from .test_hub import CLOSED

ROWS = [{"text": f"row {number} {'ab' * (number % 5)}"} for number in range(16)]


def to_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def at_hub(endpoint, cache, rank):
    """In a process of a run: where the hub and its cache are."""
    import huggingface_hub.file_download as downloads

    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.ENDPOINT, constants.HF_HUB_CACHE = endpoint, cache
    for module in (constants, downloads):
        module.HUGGINGFACE_CO_URL_TEMPLATE = template


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A hub, and a run of two processes from its names: (hub, folder, what was printed, cache)."""
    folder = tmp_path_factory.mktemp("hub")
    save_base(folder / "base.pth", n_embd=45, head_size=15)
    with serving() as hub:
        hub.add("o/n", {"base.pth": (folder / "base.pth").read_bytes()})
        hub.add("o/d", {"a.jsonl": to_jsonl(ROWS[:8]), "b.jsonl": to_jsonl(ROWS[8:])}, "datasets")
        cache = str(folder / "cache")
        printed = succeed(train(hub.endpoint, cache, folder / "run", "--epoch_steps", "2", devices=2))
        yield hub, folder, printed, cache


def train(
    endpoint, cache, proj_dir, *flags, devices=1, model="hf://o/n", data="hf://o/d/a.jsonl:2,hf://o/d/b.jsonl"
):
    settings = {
        "load_model": model,
        "data_file": data,
        "proj_dir": str(proj_dir),
        "tokenizer": "bytes",
        "packing": "0",
        "accelerator": "cpu",
        "lr_init": "1e-2",
        "micro_bsz": "2",
        "eval_split": "0",
        "epoch_count": "1",
        "peft_config": "r=5",
        "devices": str(devices),
    }
    command = [word for name, value in settings.items() for word in (f"--{name}", value)]
    return program.run([*command, *flags], functools.partial(at_hub, endpoint, cache))


def test_the_processes_of_a_run_download_once_and_record_the_commit(run):
    hub, folder, printed, _ = run
    for name, count in (("a.jsonl", 1), ("b.jsonl", 1)):
        assert len(hub.asked("GET", name)) == count
    assert len([one for one in hub.log if one[:2] == ("large", "GET")]) == 1
    commit, data = hub.branches["models", "o/n"]["main"], hub.branches["datasets", "o/d"]["main"]
    recorded = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    assert recorded["load_model"] == f"hf://o/n/base.pth@{commit}"
    assert recorded["data_file"] == f"hf://o/d/a.jsonl@{data}:2,hf://o/d/b.jsonl@{data}"
    assert f"--load_model hf://o/n/base.pth@{commit}" in (folder / "run" / "run_card.md").read_text()
    assert f"merge --base hf://o/n/base.pth@{commit} --adapter {folder / 'run' / 'adapter.pth'}" in printed


def test_a_resumed_run_keeps_its_commit_and_needs_no_network(run, tmp_path):
    hub, folder, _, cache = run
    shutil.copytree(folder / "run", tmp_path / "run")
    resumed = ["--epoch_steps", "4", "--resume", "auto"]
    before = dict(hub.branches["models", "o/n"])
    hub.add("o/n", {"base.pth": b"another base"})
    hub.add("o/d", {"a.jsonl": "", "b.jsonl": ""}, "datasets")
    try:
        succeed(train(CLOSED, cache, tmp_path / "run", *resumed))  # in one process now
        code, said = train(hub.endpoint, cache, folder / "new", "--epoch_steps", "4")
    finally:
        hub.branches["models", "o/n"] = before
    assert losses(tmp_path / "run")[:2] == losses(folder / "run")
    assert len(losses(tmp_path / "run")) == 4
    assert code == 2 and "base.pth" in said  # a new run takes what is there now


def test_a_name_in_a_file_starts_no_download(run, tmp_path, monkeypatch):
    """In a model's or adapter's metadata, and in the data."""
    hub, folder, _, cache = run
    asked = len(hub.log)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    named = {"tokenizer": "hf://o/n/base.pth", "template": "hf://o/n/base.pth", "base": "hf://o/n/base.pth"}
    path = tmp_path / "named.pth"
    write_checkpoint(path, read_checkpoint(folder / "base.pth").items(), named)
    with pytest.raises(UserError, match="hf://o/n/base.pth"):
        recorded_tokenizer("auto", "", 256, str(path))
    (tmp_path / "rows.jsonl").write_text(to_jsonl([{"text": "hf://o/n/base.pth"}]))
    config = Config(load_model=str(path), data_file=str(tmp_path / "rows.jsonl"))
    assert fetch_inputs(config).load_model == str(path) and not (tmp_path / "cache").exists()
    code, said = train(
        hub.endpoint,
        cache,
        tmp_path / "run",
        *"--template auto --tokenizer auto".split(),
        model=str(path),
        data=str(tmp_path / "rows.jsonl"),
    )
    assert code == 2 and "hf://o/n/base.pth" in said
    assert len(hub.log) == asked


def test_the_model_card_names_the_base_and_the_data_and_no_path(run):
    hub, folder, _, cache = run
    card = ModelCard.load(folder / "run" / "README.md")
    head = card.data.to_dict()
    assert head.pop("tags") == ["rwkv", "rwkv7", "miss"]
    assert head == {
        "library_name": "rwkv-miss",
        "pipeline_tag": "text-generation",
        "base_model": "o/n",
        "base_model_relation": "adapter",
        "datasets": ["o/d"],
    }
    assert str(folder) not in card.content and cache not in card.content
    (first, *_, last) = losses(folder / "run")
    assert f"| training loss | {first:.4f} to {last:.4f} |" in card.content
    commit = hub.branches["models", "o/n"]["main"]
    use = f"--model hf://o/n/base.pth@{commit} --adapter hf://OWNER/NAME/adapter.pth"
    assert use in card.content and "convert hf://OWNER/NAME/adapter.pth FOLDER --to peft" in card.content


def facts_of(folder):
    """Read from a run's folder what its card is made of."""
    config = settle({"config": str(folder / "config.yaml")})
    metrics = read_rows(folder / "metrics.jsonl")
    return config, json.loads((folder / "run.json").read_text()), metrics


def test_a_card_of_local_files_names_no_repository_and_no_folder(run):
    _, folder, _, _ = run
    config, summary, metrics = facts_of(folder / "run")
    files = {"load_model": "/secret/base.pth", "data_file": "/secret/a|b.jsonl:2,/secret/c.jsonl"}
    config = dataclasses.replace(config, **files)
    history = [{"step": 0, "loss": 3.25}, {"step": 1, "loss": 1.5}, {"step": 2, "loss": None}]
    text = model_card(config, summary, metrics, history, str(folder / "run" / "adapter.pth"))
    assert {"base_model", "datasets", "license"}.isdisjoint(ModelCard(text).data.to_dict())
    assert "secret" not in text and "`a\\|b.jsonl` (weight 2), `c.jsonl`" in text
    assert "|  | before, step 0 | after, step 2 | best, step 1 |" in text
    assert "| loss, per token | 3.2500 | not finite | 1.5000 |" in text
    assert "`base.pth`" in text and "--model base.pth --adapter" in text


def test_a_card_names_a_base_that_is_a_folder(run, monkeypatch):
    """Also where a slash ends its path, and where the file does not record it."""
    _, folder, _, _ = run
    config, summary, metrics = facts_of(folder / "run")
    config = dataclasses.replace(config, load_model="/secret/base/", data_file="a.jsonl")
    adapter = folder / "run" / "adapter.pth"
    metadata = read_metadata(adapter)
    for recorded in ("base", None):
        monkeypatch.setattr(rwkv_miss, "read_metadata", lambda _, base=recorded: {**metadata, "base": base})
        text = model_card(config, summary, metrics, [], str(adapter))
        assert "for `base`" in text and "| base | `base` |" in text
        assert "--model base --adapter" in text and "--base base --adapter" in text


def test_a_card_of_full_training_is_of_a_finetune(run):
    _, folder, _, _ = run
    config, summary, metrics = facts_of(folder / "run")
    config = dataclasses.replace(config, peft="none", data_file="o/d/en")
    text = model_card(config, summary, metrics, [], str(folder / "base.pth"))
    head = ModelCard(text).data.to_dict()
    assert head["base_model_relation"] == "finetune" and head["datasets"] == ["o/d"]
    assert "full training" in text and "--model hf://OWNER/NAME/base.pth" in text and "merge" not in text


def test_a_card_that_is_the_users_is_left_alone(run, tmp_path):
    _, folder, _, _ = run
    config, summary, metrics = facts_of(folder / "run")
    config = dataclasses.replace(config, proj_dir=str(tmp_path))
    write_model_card(config, summary, metrics, [], str(folder / "run" / "adapter.pth"))
    path = tmp_path / "README.md"
    written = path.read_text()
    path.write_text(f"{written}\nmore")
    write_model_card(config, summary, metrics, [], str(folder / "run" / "adapter.pth"))
    assert path.read_text() == written
    path.write_text(mine := written.replace(WRITTEN, ""))
    write_model_card(config, summary, metrics, [], str(folder / "run" / "adapter.pth"))
    assert path.read_text() == mine
