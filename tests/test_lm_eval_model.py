"""lm-evaluation-harness on our models: the same scores as the package `rwkv` gives, driven the same way."""

import importlib.util
import json
import pathlib
import types

import pytest
import torch

import rwkv_miss
from scripts import lm_eval as program
from src.data.templates import load_template
from src.data.tokenizer import load_tokenizer
from src.evaluation import likelihood
from src.evaluation.likelihood import log_likelihoods
from src.inference.engine import Request
from src.inference.generate import stream
from src.model import RWKV

from .answering import engine_of
from .conftest import make_arch, pypi_rwkv, random_tensors

# the tests that need the harness import it: it takes three seconds, also where tests are only collected
pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("lm_eval"),
    reason="lm-evaluation-harness IS ABSENT: pip install 'lm_eval>=0.4.12'",
)

HITS = (854, 1428)  # the two of LAMBADA's 5153 texts whose last word the 3M model finds


def package_model(path, encode):
    """The PyPI package as a model of the harness, without batches."""
    from lm_eval.api.model import LM

    run = pypi_rwkv(path)

    class Package(LM):
        def loglikelihood(self, requests):
            return [self.score(*request.args) for request in requests]

        def score(self, context, continuation):
            before, after = encode(context), encode(continuation)
            logits, _ = run([*before, *after[:-1]])
            logs = logits[len(before) - 1 :].double().log_softmax(-1)
            return (
                sum(float(row[token]) for row, token in zip(logs, after, strict=True)),
                logs.argmax(-1).tolist() == after,
            )

        loglikelihood_rolling = generate_until = None

    return Package()


@pytest.mark.slow
def test_lambada_gives_the_score_of_the_package(data_dir, tmp_path, capsys):
    import lm_eval.evaluator
    from lm_eval.tasks import TaskManager

    from src.evaluation.lm_eval_model import Lambada

    # in fp32, because the package normalises the embedding of v6 in the file's dtype
    model, data, out = (tmp_path / name for name in ("model.pth", "lambada.jsonl", "ours.json"))
    tensors = rwkv_miss.read_checkpoint(data_dir / "real/rwkv6-3m-utf16.pth")
    rwkv_miss.write_checkpoint(model, ((name, tensor.float()) for name, tensor in tensors.items()))
    texts = (data_dir / "lambada_test.jsonl").read_text().splitlines()
    chosen = [texts[i] for i in HITS] + sorted(texts, key=len)[:5]
    data.write_text("\n".join(chosen) + "\n")
    program.main(
        f"""
            --model {model} --tokenizer utf16 --tasks lambada_local --data_file {data} --out {out}
            --bos none
        """.split()
    )
    printed = capsys.readouterr().out
    last = json.loads(printed.splitlines()[-1])
    assert "BOS: none" in printed and last["bos"] == []
    ours = json.loads(out.read_text())
    package = package_model(model, lambda text: list(text.encode("utf-16-le")))
    theirs = lm_eval.evaluator.simple_evaluate(
        package, tasks=[Lambada(str(data))], task_manager=TaskManager(include_defaults=False)
    )
    scores, other = ours["results"]["lambada_local"], theirs["results"]["lambada_local"]
    assert scores["acc,none"] == other["acc,none"] == len(HITS) / len(chosen)
    assert scores["perplexity,none"] == pytest.approx(other["perplexity,none"], rel=1e-4)
    pairs = [
        [run["samples"]["lambada_local"][i]["filtered_resps"][0] for run in (ours, theirs)]
        for i in range(len(chosen))
    ]
    for (mine, mine_greedy), (wanted, wanted_greedy) in pairs:
        assert mine_greedy == wanted_greedy
        # fp32 against fp32: 2e-6 was the largest difference seen
        assert mine == pytest.approx(wanted, abs=1e-5)
    assert last["results"]["lambada_local"]["acc,none"] == scores["acc,none"]
    assert last["lm_eval"] == lm_eval.__version__


@pytest.fixture(params=[6, 7])
def model(request):
    made = RWKV(make_arch(request.param, vocab_size=257)).eval().requires_grad_(False)
    made.load_state_dict(random_tensors(made.arch))
    return made


@pytest.mark.parametrize("at_once", [1, 60, 1 << 14])
def test_likelihoods_are_those_of_one_text_at_a_time(model, at_once, monkeypatch):
    monkeypatch.setattr(likelihood, "TOKENS", at_once)
    monkeypatch.setattr(likelihood, "LOGITS", 3 * 257)
    draw = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randint(257, (n,), generator=draw).tolist(), torch.randint(257, (m,), generator=draw).tolist())
        for n, m in ((17, 3), (1, 1), (30, 8), (2, 16), (5, 1))
    ]
    pairs += [
        (pairs[4][0], [7]),
        (pairs[4][0], [7, 9]),
        (pairs[3][0] + pairs[3][1][:3], pairs[3][1][3:]),
        (pairs[0][0], []),
    ]
    context = pairs[1][0]
    for _ in range(3):  # three tokens by the model itself
        context = context + [int(model(torch.tensor([context]))[0][0, -1].argmax())]
    pairs.append((context[:1], context[1:]))
    for (before, after), (got, is_greedy) in zip(pairs, log_likelihoods(model, pairs), strict=True):
        logs = model(torch.tensor([before + after]))[0][0, len(before) - 1 : -1].double().log_softmax(-1)
        assert got == pytest.approx(sum(float(row[token]) for row, token in zip(logs, after)), abs=1e-4)
        assert is_greedy == (logs.argmax(-1).tolist() == after)
    assert log_likelihoods(model, pairs)[-1][1] and not log_likelihoods(model, pairs)[0][1]
    assert log_likelihoods(model, []) == []
    with pytest.raises(ValueError, match="context is empty"):
        log_likelihoods(model, [([], [1])])


def test_what_reads_the_same_tokens_is_computed_once(model, monkeypatch):
    sizes = []
    features = RWKV.features

    def noted(self, ids, *args, **kwargs):
        sizes.append(tuple(ids.shape))
        return features(self, ids, *args, **kwargs)

    monkeypatch.setattr(RWKV, "features", noted)
    log_likelihoods(model, [([1, 2, 3], [choice]) for choice in (4, 5, 6, 7)])
    assert sizes == [(1, 3)]


def request(*args):
    return types.SimpleNamespace(args=args)


@pytest.fixture
def harness(model):
    return harness_model(model, "bytes")


def harness_model(model, tokenizer, *template):
    from src.evaluation.lm_eval_model import HarnessModel

    return HarnessModel(model, load_tokenizer(tokenizer, 65536 if tokenizer == "world" else 257), *template)


@pytest.fixture
def letters(tmp_path):
    """A vocabulary whose every text is made of whole characters."""
    path = tmp_path / "letters.txt"
    path.write_text("".join(f"{i} {chr(31 + i)!r} 1\n" for i in range(1, 96)))
    return str(path)


def test_a_text_is_as_likely_as_its_parts(harness):
    pairs = ("A", " cat"), ("A cat", " sat."), ("A", " cat sat."), ("\0", "A cat sat.")
    first, second, both, text = (
        total for total, _ in harness.loglikelihood([request(*pair) for pair in pairs])
    )
    assert first + second == pytest.approx(both, abs=1e-4)
    # a text with nothing before it comes after the end of a document, which is NUL
    assert harness.loglikelihood_rolling([request("A cat sat."), request("")]) == [
        pytest.approx(text, abs=1e-4),
        0.0,
    ]
    assert harness.loglikelihood([request("", "A cat sat.")])[0][0] == pytest.approx(text, abs=1e-4)


def test_tokens_at_the_border(model):
    world = harness_model(model, "world")
    encode = world.tokenizer.encode
    assert world._tokens("The cat ", "sat") == (encode("The cat"), encode(" sat"))
    assert encode("hello") != [*encode("hel"), *encode("lo")]
    assert world._tokens("hel", "lo") == (encode("hel"), encode("lo"))
    assert world._tokens("", "lo") == ([0], encode("lo"))


def test_answers_end_where_they_should(model, letters):
    harness = harness_model(model, letters)
    prompts = ["a", "What is it?", "bc", "", "What else? "]
    plain = harness.generate_until([request(text, {"max_gen_toks": 30}) for text in prompts])
    engine = engine_of(harness.model, harness.tokenizer)
    alone = ["".join(stream(engine, Request(harness.tokenizer.encode(text) or [0], 30))) for text in prompts]
    assert plain == alone and len(set(plain)) > 2
    stops = [plain[0][4:7], plain[1][9:11], "never said"]
    stopped = harness.generate_until(
        [request(text, {"until": stops, "max_gen_toks": 30}) for text in prompts]
    )
    for text, whole in zip(stopped, plain, strict=True):
        assert text == whole[: min([whole.find(stop) for stop in stops if stop in whole], default=30)]
    assert stopped[0] != plain[0] and stopped[1] != plain[1]
    mixed = harness.generate_until(
        [request("a", {"until": stops[0], "max_gen_toks": 30}), request("a", {"max_gen_toks": 3})]
    )
    assert mixed == [stopped[0], plain[0][:3]]


def test_sampled_answers_are_those_of_their_seed_and_place(harness):
    warm = {"do_sample": True, "temperature": 0.7, "max_gen_toks": 20}
    sampled, other, greedy = harness.generate_until(
        [request("a", warm), request("a", warm), request("a", {**warm, "do_sample": False})]
    )
    assert len({sampled, other, greedy}) == 3
    assert harness.generate_until([request("a", warm), request("a", warm | {"top_k": 1})]) == [
        sampled,
        greedy,
    ]
    harness.seed = 1
    assert harness.generate_until([request("a", warm)]) != [sampled]


def test_a_conversation_is_asked_in_the_models_template(model):
    harness = harness_model(model, "bytes", load_template("fake-think"))
    asked = harness.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert asked == "User: Hi\n\nAssistant: <think>\n</think"
    assert harness.chat_template(True) == "fake-think:hermes" and harness.tokenizer_name == "bytes"


FROM_A_FILE = """
dataset_path: json
dataset_name: null
dataset_kwargs: {data_files: {test: FILE}}
"""
FIRST_LINE = """
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{canonical_solution}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """The harness's libraries without a network, and with nothing kept from earlier."""
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_the_harness_reads_humaneval_from_a_file_but_lacks_its_metric(
    tmp_path, checkpoint, capsys, no_network
):
    """If this fails at `code_eval`, the harness may do what --score code does: then see docs/worklog.md."""
    row = {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n",
        "entry_point": "one",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }
    file, base = tmp_path / "HumanEval.jsonl", checkpoint(7, vocab_size=257)
    file.write_text(json.dumps(row) + "\n")
    data = FROM_A_FILE.replace("FILE", str(file))
    (tmp_path / "exact.yaml").write_text(f"task: exact{data}{FIRST_LINE}")
    (tmp_path / "unsafe.yaml").write_text(f"task: unsafe{data}{FIRST_LINE}unsafe_code: true\n")
    theirs = pathlib.Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    for name in ("humaneval", "mbpp"):
        included = f"include: {theirs / name / name}.yaml\ntask: {name}_of_a_file{data}"
        (tmp_path / f"{name}.yaml").write_text(included)

    def harness(task):
        flags = ["--tokenizer", "bytes", "--include_path", str(tmp_path), "--tasks", task]
        program.main(["--model", str(base), *flags])

    harness("exact")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["exact"]["sample_len"] == 1
    for task in ("humaneval_of_a_file", "mbpp_of_a_file"):
        with pytest.raises(rwkv_miss.UserError, match="Module 'code_eval' doesn't exist on the Hugging Face"):
            harness(task)
    with pytest.raises(rwkv_miss.UserError, match="task unsafe runs what the model writes"):
        harness("unsafe")


def test_mistakes_are_explained_before_the_model_is_loaded(tmp_path):
    (tmp_path / "broken.yaml").write_text(
        "task: broken\ndataset_path: json\ndataset_kwargs:\n  data_files: nowhere.jsonl\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: a\ndoc_to_target: b\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    for task, flags, message in (
        ("lambada_local", [], "task lambada_local needs --data_file"),
        ("lambada_local", ["--data_file", str(tmp_path / "rows.jsonl")], 'has no row {"text": ...}'),
        ("broken", ["--include_path", str(tmp_path)], "the harness can't load the tasks: FileNotFoundError"),
        ("lambada_openai", ["--out", str(tmp_path)], "is a folder"),
        ("lambada_openai", ["--data_file", "rows.jsonl"], "--data_file is for the task lambada_local"),
        ("lambada_openai", ["--limit", "0"], "--limit 0: must be at least 1"),
    ):
        flags = ["--tasks", task, *flags]
        with pytest.raises(rwkv_miss.UserError, match=message):
            program.main(["--model", "nowhere.pth", *flags])
    with pytest.raises(
        rwkv_miss.UserError, match="task 'lambada_lokal' is unknown to the harness; near: lambada_openai$"
    ):
        program.known("lambada_lokal", types.SimpleNamespace(all_tasks=["lambada_openai", "piqa"]))
