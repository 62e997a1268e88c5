"""Questions, chosen settings and table of benchmarks.distill."""

from benchmarks import distill


def test_what_judges_is_not_trained_on_and_chooses_nothing(tmp_path):
    trainings = distill.Trainings(tmp_path)
    asked = {name: {row["question"] for row in rows} for name, rows in trainings.questions.items()}
    assert {name: len(questions) for name, questions in asked.items()} == {
        "judges": 400,
        "chooses": 100,
        "rows": 100,
    }
    assert len(set.union(*asked.values()) | trainings.seen) == 600
    assert len(trainings.data.read_text().splitlines()) == 100


def line(case, settings, seed, judges, chooses):
    return {
        "case": case, "settings": settings, "seed": seed, "parameters": 1000, "judges": judges,
        "chooses": chooses, "cpu_seconds": 3.0 + seed,
    }  # fmt: skip


def test_the_table_has_the_settings_that_were_best_for_the_questions_that_choose():
    assert distill.CASES["on-policy"].tried[1] == "--lr_init 0.002 --distill_temperature 2"
    tried = [line("offline", "--lr_init 1", 0, 0.9, 0.5), line("offline", "--lr_init 2", 0, 0.2, 0.6)]
    assert distill.chosen(tried) == "--lr_init 2"
    own = [line("offline", "--lr_init 2", seed, 0.2 + seed / 10, 0.6) for seed in (0, 1)]
    (row,) = distill.table(own).rows
    assert tuple(row) == ("offline", "1,000", "`--lr_init 2`", "2", "25.0 % (20 to 30)", "3.5")
