"""Settings: one precedence, no dead or silent flag, and every mistake explained."""

import ast
import dataclasses
import pathlib
import pickle
import shlex
import subprocess
import sys

import pytest
import yaml

from rwkv_miss import METHODS, UserError
from src import config
from src.config import AUTO, FIELDS, Config, command, legacy, parse
from src.config.adapter_options import AdapterOptions
from src.config.schema import NAMES, PRESETS, type_of
from src.config.validate import check_bounds, check_sizes
from src.planning.draft import Draft

from .conftest import ROOT, make_arch

REQUIRED = ["--load_model", "base.pth", "--data_file", "rows.jsonl"]


def settings(*flags):
    return parse([*REQUIRED, *flags])


def mistake(*flags):
    with pytest.raises(UserError) as caught:
        parse([*REQUIRED, *flags])
    return str(caught.value)


# where a value comes from


def test_the_command_line_wins_over_yaml_over_the_preset_over_the_default(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr_init: 3e-4\nwarmup_steps: 7\npreset: paper-table7\n")
    values = parse([*REQUIRED, "--config", str(path), "--lr_init", "1e-3"])
    expected = {
        "lr_init": (1e-3, "command line"),
        "warmup_steps": (7, str(path)),
        "preset": ("paper-table7", str(path)),
        "global_bsz": (64, "preset paper-table7"),
        "peft_config": ({"rank": 64}, "preset paper-table7"),
        "grad_clip": (1.0, "default"),
    }
    assert {name: (getattr(values, name), values.origin_of(name)) for name in expected} == expected
    assert {type(getattr(values, name)) for name in ("lr_init", "weight_decay")} == {float}


def test_the_preset_may_come_from_either_place_and_gives_way_to_both(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("peft: lora\nweight_decay: 0.125\n")
    values = parse([*REQUIRED, "--config", str(path), "--preset", "paper-table8", "--global_bsz", "24"])
    assert (values.weight_decay, values.global_bsz, values.peft_config) == (
        0.125,
        24,
        {"rank": 64, "alpha": 128.0},
    )
    assert values.origins["peft_config"] == "preset paper-table8"
    assert values.origins["global_bsz"] == "command line"


def test_the_presets_are_the_papers_tables_7_and_8():
    common = dict(
        lr_init=2e-5, lr_schedule="cos", warmup_steps=0, epoch_count=1, weight_decay=0.0, eval_split=0.0
    )
    small, large = {"rank": 36, "alpha": 72.0}, {"rank": 64, "alpha": 128.0}
    assert PRESETS == {
        "paper-table7": (
            common | {"global_bsz": 64},
            {"miss": {"rank": 64}, "lora": small, "dora": small, "pissa": {"rank": 36, "alpha": 36.0}},
        ),
        "paper-table8": (
            common | {"global_bsz": 128},
            {"miss": {"rank": 128}, "lora": large, "dora": large, "pissa": {"rank": 64, "alpha": 64.0}},
        ),
    }
    assert set(PRESETS) == set(FIELDS["preset"].metadata["choices"]) - {""}
    for name, (_, methods) in PRESETS.items():
        for method, options in methods.items():
            values = settings("--preset", name, "--peft", method, "--micro_bsz", "8")
            assert METHODS[method].Options.parse(values.peft_config).rank == options["rank"]
            assert values.micro_bsz * values.accumulation == PRESETS[name][0]["global_bsz"]


def test_the_saved_file_is_the_same_configuration_and_says_where_it_came_from(tmp_path):
    flags = [
        "--peft_config",
        '{"r": 5, "targets": ["att.key", "value"]}',
        "--proj_dir",
        "out: a #b, {c} 'd' 日本",
    ]
    flags += "--preset paper-table7 --eod 1 --grad_cp 1 --adam_eps 1e-12 --tokenizer [yes]".split()
    values = parse([*REQUIRED, *flags])
    path = tmp_path / "config.yaml"
    config.save(values, path)
    again = parse(["--config", str(path)])
    assert again == values and {again.origin_of(name) for name in FIELDS} == {str(path)}
    lines = path.read_text().splitlines()
    assert len(lines) == len(FIELDS)
    for line in (
        "lr_schedule: cos  # preset paper-table7",
        "grad_cp: 1  # command line",
        "beta1: 0.9  # default",
    ):
        assert line in lines


def test_a_setting_is_never_written_to():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().ctx_len = 9


def test_what_is_left_to_the_program_is_no_number():
    """A forgotten choice stops the run where it is used, and does not count as 0 or -1."""
    for use in (
        *(bool, lambda x: x < 3, lambda x: x + 1, lambda x: 2 * x, dict, list),
        lambda x: dataclasses.replace(Config().settled(), beta=x),
    ):
        with pytest.raises(TypeError):
            use(AUTO)
    assert pickle.loads(pickle.dumps(Config())) == Config(), "as ranks compare their settings"
    typed = {name: str(Config().written(name)) for name in FIELDS if getattr(Config(), name) is AUTO}
    assert len(typed) > 15
    flags = [f"--{name}={value}" for name, value in typed.items() if value != "{}"]
    assert all(settings(*flags).is_automatic(name) for name in typed)


def test_the_file_says_what_was_chosen_and_why(tmp_path):
    """A choice that looks like the word for no choice, such as 0, is one in the record of the run."""
    draft = Draft(parse([*REQUIRED, "--loss", "grpo", "--clip_high", "0.3"]))
    draft.choose("beta", 0.0, "no KL: cheap")
    draft.choose("ctx_len", 64, "the longest")
    draft.choose("clip_high", 0.1, "not asked for")
    path = str(tmp_path / "config.yaml")
    config.save(draft.config, path)
    lines = pathlib.Path(path).read_text().splitlines()
    assert {"ctx_len: 64  # chosen", "clip_high: 0.3  # command line", "max_tokens: 0  # default"} <= {*lines}
    recorded = config.recorded_settings(path)
    assert recorded.settings == draft.config.settled()
    assert recorded.chosen == {"beta": "no KL: cheap", "ctx_len": "the longest"}
    assert parse(["--config", path]).is_automatic("beta"), "as a command it leaves the choice open"


def test_every_default_survives_the_file(tmp_path):
    values = Config(load_model="base.pth", data_file="rows.jsonl")
    config.save(values.settled(), tmp_path / "config.yaml")
    assert parse(["--config", str(tmp_path / "config.yaml")]) == values


# names


def test_names_of_neighbouring_projects():
    values = settings("--my_testing", "x060", "--head_size_a", "32", "--op", "reference", "--peft", "bone")
    assert (values.version, values.head_size, values.wkv, values.peft) == ("x060", 32, "reference", "miss")
    assert settings("--peft", "disha").peft == "miss"


def test_every_name_has_one_meaning():
    names = [name for field in FIELDS.values() for name in (field.name, *field.metadata["alias"])]
    assert set(NAMES) == set(names)
    assert len(names) == len(set(names)) and not set(names) & legacy.NAMES
    assert all(0 < method.default_lr < 1e-1 for method in METHODS.values() if method.adapts_linears)


def test_files_that_are_no_settings(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"proj_dir: \xff\n")
    assert "not valid YAML" in mistake("--config", str(path))
    path.write_text("[" * 100_000)
    assert "or more than 32 inside each other" in mistake("--config", str(path))
    path.write_text("#" * 200_000)
    assert "has more than the 131,072 bytes" in mistake("--config", str(path))
    assert "does not exist" in mistake("--config", str(tmp_path / "absent.yaml"))
    assert mistake("--config", str(tmp_path)).endswith("is a folder; give a file")
    (tmp_path / "config.yaml").touch()
    assert (
        mistake("--config", str(tmp_path))
        == f"config file {tmp_path} is a folder; give {tmp_path}/config.yaml"
    )


# values


@pytest.mark.parametrize(
    "text",
    [
        '{"r": 8, "targets": ["key", "att.value"]}',
        ' { "r" : 8 , "targets" : [ "key" , "att.value" ] } ',
        "r=8,targets=key+att.value",
        " r=8, target_modules=key+att.value ,",
    ],
)
def test_adapter_options_as_json_or_pairs(text):
    assert settings("--peft_config", text).adapter == AdapterOptions("miss", {"r": 8}, ["key", "att.value"])


def test_adapter_options_in_yaml_and_of_every_kind(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {**dict(zip(["load_model", "data_file"], "ab")), "peft_config": {"r": 8, "targets": ["key"]}}
        )
    )
    assert parse(["--config", str(path)]).adapter == AdapterOptions("miss", {"r": 8}, ["key"])
    path.write_text("load_model: a\ndata_file: b\npeft_config: {1: 2}\n")
    # whose name is then refused
    assert parse(["--config", str(path)]).adapter == AdapterOptions("miss", {"1": 2}, None)
    options = settings("--peft_config", "alpha=1e2,layout=contiguous,magnitude=True,expand=false").peft_config
    assert options == {"alpha": 100.0, "layout": "contiguous", "magnitude": True, "expand": False}
    assert settings().adapter == AdapterOptions("miss", {}, None)
    assert settings("--peft", "none").adapter is None


NUMBERS = [name for name in FIELDS if type_of(name) in (int, float)]


def test_which_numbers_may_be_negative():
    without = {name for name in NUMBERS if FIELDS[name].metadata["bounds"].low is None}
    assert without == {"lr_final", "grad_cp", "eval_split", "save_steps"}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_bound_of_a_number_is_checked(name):
    bounds = FIELDS[name].metadata["bounds"]
    below = bounds.below or (2**31 if type_of(name) is int else None)
    right = [number for number in (bounds.low, bounds.high) if number is not None]
    wrong = [] if bounds.low is None else [bounds.low - 1]
    wrong += [] if bounds.high is None else [bounds.high * 2]
    wrong += [] if below is None else [below]
    for number in right:
        check_bounds(Config(**{name: number}), [name])
    for number in wrong:
        with pytest.raises(UserError, match=f"--{name} .*: must "):
            check_bounds(Config(**{name: number}), [name])


def test_numbers_as_people_write_them():
    values = settings("--epoch_steps", "1e3", "--lr_init", "1", "--grad_cp", "True")
    assert (values.epoch_steps, values.lr_init, values.grad_cp) == (1000, 1.0, True)
    assert settings("--random_seed", str(2**63 - 1)).random_seed == 2**63 - 1, "no digit is lost"
    assert settings("--global_bsz", "48", "--devices", "2", "--micro_bsz", "3").accumulation == 8


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("version", "x060"),
        ("n_layer", 3),
        ("n_embd", 64),
        ("vocab_size", 65536),
        ("dim_att", 47),
        ("dim_ffn", 1),
        ("head_size", 64),
    ],
)
def test_a_size_that_contradicts_the_checkpoint_shows_both(name, wrong):
    arch = make_arch(7)
    in_file = {"version": "x070", "head_size": arch.head_size}.get(name) or getattr(arch, name)
    check_sizes(Config(load_model="base.pth", **{name: in_file}), arch)
    with pytest.raises(UserError) as caught:
        check_sizes(Config(load_model="base.pth", **{name: wrong}), arch)
    assert (
        str(caught.value) == f"base.pth has {name} {in_file}, but --{name} {wrong} was given; drop the flag"
    )


# effects of the flags


def test_every_setting_is_read_somewhere():
    """As `config.NAME`, `c.NAME`, `values["NAME"]` or `config.settled().NAME`; by Config `self.NAME`;
    by a loss `self.options.NAME`, or of that `given.NAME`.

    The rules of validate.py alone would not make a setting do something.
    """
    read = set()
    for path in (ROOT / "src").rglob("*.py"):
        if path == ROOT / "src/config/validate.py":
            continue
        holders = ("config", "c", "settled", *(["self"] if path.name == "schema.py" else []))
        holders += ("given", "options") if path.parent.name == "losses" else ()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                holder = getattr(node.value, "func", node.value)
                if getattr(holder, "id", getattr(holder, "attr", "")) in holders:
                    read.add(node.attr)
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                read.add(node.slice.value)
    dead = sorted(set(FIELDS) - read)
    assert not dead, f"settings that nothing reads: {dead}"


def test_every_setting_explains_itself():
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    words = " ".join(done.stdout.split())
    for field in FIELDS.values():
        assert f"--{field.name} " in words and len(field.metadata["help"]) > 3
        for choice in field.metadata["choices"]:
            assert choice.removeprefix("deepspeed_stage") in field.metadata["help"], (
                f"--{field.name} does not say that it takes {choice}"
            )


def test_the_command_of_a_run_is_read_back_as_its_settings():
    odd = dict(load_model="a b.pth", data_file="it's.jsonl", loss_mask="- q:", eod="-x")
    settings = Config(**odd, lr_final=0.0, packing=False, peft_config={"r": 5})
    assert parse(shlex.split(command(settings))[2:]) == settings
    one, two = (command(Config(epoch_count=count, epoch_steps=70)) for count in (1, 2))
    assert one == "python train.py --epoch_steps 70" and two.startswith("python train.py --epoch_count 2 ")
