"""Measure tokens a second of many answers at once.

One run compares the decoder with bf16 and int8 weights, in pages of 4 KB and 2 MB, with adapters that differ
by row, and llama.cpp with as many sequences in one llama_decode.

    python -m benchmarks.decode_batches [--version 7] [--layers 12] [--width 768] [--rows 1 4 8 16 32]
    [--threads 1 2] [--rounds 8] [--huge_pages no yes] [--adapters 4] [--miss 64] [--llama FOLDER]

The model is random, with the World vocabulary's size. One thread is measured in CPU time, more in wall time;
rounds alternate between the contenders, and the fastest counts. bf16 weights are multiplied with exact
activations, and on CPUs that have such products also with bf16 activations; int8 weights with the activations
that the CPU multiplies fastest. Every step computes the logits of all rows.

The choice of the tokens is measured separately, for the most rows up to 16: on the model's logits, which are
flat, and on four times these, which are about as peaked as a trained model's. The engine's steps are measured
with the same rows, for free answers, for JSON of a schema, and for thoughts before JSON. The last line is
JSON.
"""

import argparse
import functools
import pathlib
import tempfile

import torch

from src import ops
from src.data.tokenizer import load_tokenizer
from src.inference import bf16_products
from src.inference.adapters import BASE, Adapters, Applied
from src.inference.constraint import AnswerForm, GrammarCompiler
from src.inference.cpu_decoder import Decoder
from src.inference.decoders import fastest
from src.inference.engine import Engine, Request
from src.inference.huge_pages import move_weights
from src.inference.sampling import GREEDY, OPEN_THINK, FadedCounts, RowInputs, Sampling, choose
from src.model import RWKV

from .common import add_integers, argument_parser, report, timed
from .decode_contenders import llama_contenders, write_adapter, write_base

STEPS = 5  # steps of a round
SAMPLINGS = {"greedy": GREEDY, "default": Sampling(), "whole": Sampling(1, 1), "open_think": OPEN_THINK}
SEEN = 400  # earlier tokens of an answer, which penalties count
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 200},
    },
    "required": ["name", "tags"],
}
FORMS = {
    "JSON": "start: @json",
    "thoughts": 'start: h @json\nh[lazy]: TEXT "</think>"\nTEXT: /(?s:.*)/',
}


class Rows:
    """Our decoder of one kind, "bf16", "bf16 act." or "int8"; start() sets the number of threads."""

    def __init__(self, path, kind: str, most: int, huge_pages: str, adapters: dict | None = None):
        self.model = RWKV.load(path, torch.bfloat16, kernel=ops.choose("cpu", "cpu")[0]).eval()
        self.adapters = Adapters(self.model, adapters) if adapters else None
        self.applied = [Applied((name,)) for name in adapters or ()] or [BASE]
        self.kind, self.most, self.huge_pages, self.threads = kind, most, huge_pages, 0

    def start(self, threads: int) -> None:
        torch.set_num_threads(threads)
        if threads != self.threads:
            self.threads, (self.decoder, self.words) = threads, self._make()
        for row in range(self.decoder.rows):
            self.decoder.put(row, self.model.initial_state(1))

    def _make(self) -> tuple[Decoder, str]:
        if self.kind != "bf16 act.":
            int8 = self.kind == "int8"
            return fastest(self.model, self.adapters, self.most, int8=int8, huge_pages=self.huge_pages)
        pages = move_weights(dict(self.model.named_parameters()), self.huge_pages)
        return Decoder(self.model, self.most, bf16_activations=True), f"activations in bf16, {pages}"

    def step(self, tokens: list[int]) -> torch.Tensor:
        applied = [self.applied[row % len(self.applied)] for row in range(len(tokens))]
        return self.decoder.step(tokens, applied)


def arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--version", type=int, default=7, choices=(6, 7))
    add_integers(parser, layers=12, width=768)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--huge_pages", nargs="+", default=["no", "yes"], choices=["no", "yes"])
    add_integers(parser, rounds=8, adapters=4)
    parser.add_argument("--miss", type=int, default=64, help="rank of the adapters [%(default)s]")
    parser.add_argument(
        "--llama",
        type=pathlib.Path,
        help="folder of llama.cpp's libraries; without it llama.cpp is not measured",
    )
    return parser.parse_args()


def make_contenders(path: pathlib.Path, args) -> dict:
    most, found = max(args.rows), {}
    kinds = ("bf16", "bf16 act.", "int8") if bf16_products.instruction_is_there() else ("bf16", "int8")
    for pages in args.huge_pages:
        size = {"no": "4 KB", "yes": "2 MB"}[pages]
        for kind in kinds:
            found[f"ours {kind}, {size}"] = Rows(path, kind, most, pages)
    if args.adapters:
        files = {f"a{i}": str(path.with_name(f"a{i}.pth")) for i in range(args.adapters)}
        for file in files.values():
            write_adapter(file, path, args.miss)
        pages = args.huge_pages[0]
        found[f"bf16 + {args.adapters} miss"] = Rows(path, "bf16", most, pages, files)
    # llama.cpp divides its context among the sequences, in pieces of 256
    room = 1 << (most - 1).bit_length()
    return found | llama_contenders(args.llama, path, ("BF16", "Q8_0"), sequences=room)


def steps(contender, tokens: list[list[int]]) -> None:
    for of_rows in tokens:
        contender.step(of_rows)


def measure(contenders: dict, threads: int, args) -> dict[str, dict[int, float]]:
    """Measure seconds of a step, the fastest of all rounds: contender -> number of rows -> seconds."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(65536, (STEPS, max(args.rows)), generator=generator)
    best = {name: dict.fromkeys(args.rows, float("inf")) for name in contenders}
    for contender in contenders.values():
        contender.start(threads)
        contender.step(tokens[0].tolist())
    for _ in range(args.rounds):
        for rows in args.rows:
            given = tokens[:, :rows].tolist()
            for name, contender in contenders.items():
                contender.start(threads)
                seconds = timed(functools.partial(steps, contender, given), threads)
                best[name][rows] = min(best[name][rows], seconds / STEPS)
    return best


def measure_sampling(logits: torch.Tensor, threads: int, rounds: int) -> dict[str, float]:
    """Measure milliseconds to choose a token for each row, for each sampling and kind of logits."""
    found = {}
    for kind, of_kind in {"flat": logits, "peaked": 4 * logits}.items():
        for name, sampling in SAMPLINGS.items():
            seen = FadedCounts(sampling)
            for token in torch.randint(65536, (SEEN,), generator=torch.Generator().manual_seed(0)).tolist():
                seen.add(token)
            given = [RowInputs(sampling, seen, torch.Generator().manual_seed(i)) for i in range(len(logits))]
            work = functools.partial(choose, of_kind, given, native_code=True)
            found[f"{name}, {kind}"] = round(1e3 * min(timed(work, threads) for _ in range(4 * rounds)), 3)
    return found


def measure_forms(decoder: Decoder, rows: int, threads: int, rounds: int) -> dict[str, float]:
    """Measure milliseconds of the engine's step for each form of answers; the forms take turns."""
    tokenizer = load_tokenizer("world", 65536)
    compiler = GrammarCompiler(tokenizer)
    forms: dict[str, AnswerForm | None] = {"free": None}
    for name, lark in FORMS.items():
        forms[name] = compiler.compile(lark, {"json": {"json_schema": PERSON}})
    best = dict.fromkeys(forms, float("inf"))
    for seed in range(rounds):
        for name, form in forms.items():
            engine = Engine(decoder, tokenizer)
            request = Request([1], 10_000, Sampling(), seed, ("\n\nUser:",), n=rows, form=form)
            engine.submit(request)
            engine.step()
            work = functools.partial(_run, engine.step, 4 * STEPS)
            best[name] = min(best[name], 1e3 * timed(work, threads) / (4 * STEPS))
            assert len(engine.rows) == rows
    return {name: round(ms, 2) for name, ms in best.items()}


def _run(work, count: int) -> None:
    for _ in range(count):
        work()


def of_threads(contenders: dict, threads: int, args) -> dict:
    many = max(rows for rows in args.rows if rows <= 16)
    seconds = measure(contenders, threads, args)
    rate = {name: {rows: round(rows / s, 1) for rows, s in own.items()} for name, own in seconds.items()}
    print(f"\n{threads} threads; tokens/s of all rows")
    print(f"{'':<20}", *(f"{rows:>7}" for rows in args.rows))
    for name, own in rate.items():
        print(f"{name:<20}", *(f"{tokens:7.1f}" for tokens in own.values()))
    ours = next(name for name in contenders if name.startswith("ours bf16"))
    sampling = measure_sampling(contenders[ours].step(list(range(many))).clone(), threads, args.rounds)
    for words, ms in sampling.items():
        print(f"sampling of {many} rows, {words:<22} {ms} ms")
    forms = measure_forms(contenders[ours].decoder, many, threads, args.rounds)
    for name, ms in forms.items():
        print(f"a step of the engine, {many} rows, {name:<16} {ms} ms")
    decoders = {name: one.words for name, one in contenders.items() if isinstance(one, Rows)}
    return {
        "threads": threads,
        "tokens_per_second": rate,
        "sampling_ms": sampling,
        "forms_ms": forms,
        "decoders": decoders,
    }


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = pathlib.Path(folder, "base.pth")
        write_base(path, args.version, args.layers, args.width)
        contenders = make_contenders(path, args)
        results = [of_threads(contenders, threads, args) for threads in args.threads]
    shape = {"layers": args.layers, "width": args.width, "vocabulary": 65536}
    report("decode_batches", results=results, version=args.version, shapes=shape, rounds=args.rounds)


if __name__ == "__main__":
    main()
