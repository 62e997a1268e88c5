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
    shown = [[line.strip("| ").split(" | ") for line in block.splitlines()] for block in re.findall(r"(?:^\|.*\n)+", text, re.M)]
    assert len(shown) == 1 + len(found["tables"])
    for lines, records in zip(shown, [found["claims"], *found["tables"].values()]):
        assert len(lines) == 2 + len(records) and len(records) > 0
        assert lines[0] == (["paper", "here", "agrees"] if records is found["claims"] else list(records[0]))
        assert [line[0] for line in lines[2:]] == [str(next(iter(record.values()))) for record in records]


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


def test_no_free_lunch_finds_what_does_not_depend_on_the_seed(outcome):
    found, _ = outcome("no-free-lunch")
    losses, timing = found["tables"].values()
    assert set(LINEAR) <= {row["system"] for row in losses}
    fixed = {row["system"]: row["lr 0.001 (paper)"] for row in losses}
    (unadapted,) = (float(claim["ours"].split()[-1]) for claim in found["claims"] if claim["paper"] == "full fine-tuning is best")
    assert min(fixed, key=fixed.get) == "full" and max(fixed.values()) < unadapted
    assert 0.5 < fixed["miss"] / fixed["lora, alpha = r"] < 2
    if "lora_fa" in fixed:  # MiSS with a frozen random matrix for its shards
        assert fixed["lora_fa"] > 2 * fixed["miss"]
    assert {(row["method"], row["parameters"]) for row in timing if row["method"] in ("full", "miss", "lora")} == {
        ("full", 64 * 64), ("miss", 2 * 64), ("lora", 2 * 64)}
    curves = found["curves"]["miss"]
    assert len(curves["training"]) == len(curves["validation"]) == 100 and curves["training"][-1] < 0.5 * curves["training"][0]


@pytest.mark.parametrize("reading, distinct", [("lift", 1), ("rep", 1), ("elem", 64)])
def test_the_readings_of_the_papers_data(reading, distinct):
    problem = experiment("no-free-lunch").Problem.make(reading, 50, 43)
    assert problem.x.shape == problem.t.shape == (50, 64) and problem.x_validation.shape == (200, 64)
    assert len(problem.t[0].unique()) == distinct and len(problem.x[0].unique()) == (1 if reading == "rep" else 64)
