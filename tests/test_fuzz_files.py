"""Every reader of model and adapter files against damaged ones: a result or one message, nothing
half-written, bounded memory and time.
"""

import pytest

from benchmarks import fuzz_files
from benchmarks.common import peak_above_start
from rwkv_miss import UserError

pytestmark = pytest.mark.rare

# readers that build a model, or more than one, for each input get fewer
INPUTS = dict.fromkeys(["base", "base of a merge", "MiSS", "PiSSA", "MoS", "VeRA", "unmerge", "diff"], 40)
INPUTS |= {"base, a trainer's file": 20, "base, a folder": 30}
INPUTS |= {"MiSS, in a chat": 25, "chat": 25, "MiSS, loaded": 30}


@pytest.mark.parametrize("name", fuzz_files.READERS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_end_in_a_result_or_a_message(tmp_path, name):
    ends, inputs = [], INPUTS.get(name, 80)
    peak = peak_above_start(lambda: ends.append(fuzz_files.fuzz_reader(name, tmp_path, 1, range(inputs))))
    assert ends[0].total() == inputs and ends[0]["message"] > inputs / 5
    assert peak < fuzz_files.MEGABYTES * 1e6


def refuse_and_leave(folder):
    (folder / "out.pth").write_bytes(b"half")
    raise UserError("a message that is long enough")


@pytest.mark.parametrize(
    "use,words",
    [
        (lambda folder: 1 // 0, "ZeroDivisionError"),
        (lambda folder: all(n == 0 for n in iter(int, 1)), "TooSlow"),
        (refuse_and_leave, "was left by a refused input"),
    ],
)
def test_the_fuzzer_sees_a_crash_a_hang_and_what_is_left(tmp_path, monkeypatch, use, words):
    calls = iter(range(100))
    monkeypatch.setattr(fuzz_files, "SECONDS", 0.2)
    reader = fuzz_files.Reader(fuzz_files.write_base, lambda folder: use(folder) if next(calls) else None)
    monkeypatch.setitem(fuzz_files.READERS, "broken", reader)
    with pytest.raises(AssertionError, match=f"input 0 of seed 0, broken: .*{words}"):
        fuzz_files.fuzz_reader("broken", tmp_path, 0, range(1))
