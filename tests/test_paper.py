"""The paper's experiments in their tiny settings: every one writes its three files; what each promises about its numbers."""

import json
import re

import pytest

import rwkv_miss
from benchmarks.paper.__main__ import EXPERIMENTS, experiment, main
from benchmarks.paper.methods import LINEAR
from benchmarks.paper.settings import command

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """outcome(name) -> what NAME.json holds after a tiny run, which is made once for the tests of this file."""
    made = {}

    def run(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            main([name, "--tiny", "--out", str(made[name])])
        return json.loads((made[name] / f"{name}.json").read_text()), made[name]

    return run


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_writes_its_table_plot_and_figures(name, outcome):
    found, folder = outcome(name)
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.json", f"{name}.md", f"{name}.png"]
    assert (folder / f"{name}.png").read_bytes().startswith(PNG)
    assert found["experiment"] == name and found["commit"] and found["command"] == f"python -m benchmarks.paper {name} --tiny"
    text = (folder / f"{name}.md").read_text()
    assert found["command"] in text and found["claims"]
    for records in [found["claims"], *found["tables"].values()]:
        assert records and all(len(line.split("|")) == len(records[0]) + 2 for line in re.findall(rf"^\| {_first(records)} \|.*$", text, re.M))
    assert len(re.findall(r"^\| (?!---)", text, re.M)) == sum(1 + len(rows) for rows in [found["claims"], *found["tables"].values()])


def _first(records):
    return re.escape(str(next(iter(records[0].values()))))


def test_the_list_and_the_mistakes(tmp_path, capsys):
    main([])
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{name} +\S", listed, re.M) for name in EXPERIMENTS)
    for argv, message in (([EXPERIMENTS[0], "--tinny"], "did you mean --tiny"), (["complexty"], "invalid choice"),
                          ([EXPERIMENTS[0], "--out", str(tmp_path / "file" / "x")], "can't be a folder")):
        (tmp_path / "file").touch()
        with pytest.raises(rwkv_miss.UserError, match=message):
            main(argv)


def test_the_recorded_command_gives_the_same_settings():
    module = experiment("complexity")
    assert command("complexity", module.FULL, module.FULL, module.TINY) == "python -m benchmarks.paper complexity"
    assert command("complexity", module.Settings(("1,2,3,1", "5,6,7,1")), module.FULL, module.TINY).endswith("complexity --shapes 1,2,3,1 5,6,7,1")


def test_complexity_counts_what_the_formulas_say(outcome):
    found, _ = outcome("complexity")
    (rows,) = found["tables"].values()
    assert set(LINEAR) <= {row["system"] for row in rows}
    for row in rows:
        if row["by formula"] is not None:
            counted = [row[name] for name in ("parameters", "MFLOP", "saved KiB")]
            assert counted == [row[name] for name in ("by formula", "MFLOP by formula", "KiB by formula")], row["system"]
    assert [(row["rank"], row["parameters"]) for row in rows if row["system"] == "miss"] == [(9, 9 * 40)]  # LoRA's 4 (48 + 40), to the nearest
