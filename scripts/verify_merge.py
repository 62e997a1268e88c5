"""Check whether a merged file equals base + adapters.

python -m scripts.verify_merge --base base.pth --adapter adapter.pth --merged merged.pth

Every tensor is compared bit for bit, and the logits of a short text are compared with those of the base with
its adapters unmerged.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m scripts.verify_merge")

from src.common.startup import importing, naming_missing_packages

with importing():
    import torch

    from rwkv_miss.errors import Parser, UserError, one_line_errors, printable
    from rwkv_miss.files.checkpoint import Arch
    from rwkv_miss.files.hub import local_path
    from rwkv_miss.files.model_files import is_file_or_folder, read_tensors
    from rwkv_miss.merging.cli import add_adapters, add_hints, add_output, hints
    from rwkv_miss.merging.members import Member
    from rwkv_miss.merging.rounding import TABLE_ROWS, percent
    from rwkv_miss.merging.unmerge import MergeCheck, check_merge
    from scripts.blended_adapters import blend, merge_blended
    from src import ops
    from src.data.recorded_tokenizer import recorded_tokenizer
    from src.evaluation.kl_divergence import Distance, distance, logits_of, sections
    from src.model import RWKV

# As a share of the largest logit. In models of up to 32 layers the order of fp32 sums changes logits by a
# tenth of this.
TOLERANCE = 1e-4
# names of the comparisons; live is the base with its adapters unmerged, as in training
EFFECT = "what the adapters do: base -> live"
UNROUNDED = "live -> merged, not rounded"
MERGED = "live -> merged file"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclasses.dataclass(frozen=True)
class ComparedLogits:
    """Comparison of two models' logits, both computed in `precision`, unless `what` says otherwise."""

    what: str
    precision: str
    distance: Distance


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), naming_missing_packages():
        args = arguments(argv)
        args.base, args.merged = local_path(args.base), local_path(args.merged)
        args.adapter = [local_path(adapter) for adapter in args.adapter]
        check = check_merge(args.base, args.merged, args.adapter, args.weights, hints(args))
        texts = probe_texts(args)
        rows = compare(args.base, args.merged, check.adapters, texts) if comparable(check) else []
        problems = check.problems + probe_problems(rows)
        tokens = sum(map(len, texts))
        if args.json:
            print(json.dumps(summary(check, rows, tokens, problems)))
        else:
            for line in [*check.lines(None if args.layers else TABLE_ROWS), *table(rows, tokens, problems)]:
                print(printable(line))
        if problems:
            raise SystemExit(1)


def summary(
    check: MergeCheck, rows: list[ComparedLogits], tokens: int, problems: list[str]
) -> dict[str, Any]:
    """Return the result for machines."""
    return {
        "ok": not problems,
        "problems": problems,
        "files": check.to_dict(),
        "tokens": tokens,
        "tolerance": TOLERANCE,
        "probe": [
            {"what": row.what, "precision": row.precision, **dataclasses.asdict(row.distance)} for row in rows
        ],
    }


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.verify_merge", description=__doc__)
    parser.add_argument("--base", "--base_model", required=True)
    add_adapters(parser, required=True, default="what the merged file records, else 1 each")
    add_hints(parser)
    parser.add_argument("--merged", required=True)
    parser.add_argument(
        "--text",
        help="a file with the text to compare logits on; default: src/evaluation/forgetting.txt, short and"
        " of four kinds",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=256,
        help="number of tokens to read, the first of every kind of text; default %(default)s",
    )
    parser.add_argument("--tokenizer", default="auto", help="auto: as recorded in the files")
    parser.add_argument("--eod", default="")
    add_output(parser)
    args = parser.parse_args(argv)
    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens}: must be at least 1")
    return args


def probe_texts(args: argparse.Namespace) -> list[list[int]]:
    """Encode each text of the probe."""
    arch = Arch.detect(read_tensors(args.base))
    # without folders, which hold other projects' adapters and record no tokenizer
    files = filter(is_file_or_folder, [*args.adapter, args.merged, args.base])
    tokenizer = recorded_tokenizer(args.tokenizer, args.eod, arch.vocab_size, *files)
    if args.text:
        texts = [tokenizer.encode(read_text(args.text))]
    else:
        texts = list(sections(tokenizer).values())
    texts = [ids[: max(1, args.tokens // len(texts))] for ids in texts if ids]
    if not texts:
        raise UserError(
            f"tokenizer {tokenizer.name} has no tokens for the probe's text; give another with --text"
        )
    return texts


def read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path} cannot be read: {error}") from None


def comparable(check: MergeCheck) -> bool:
    """Tell whether the merged file can be loaded as a model with the base's sizes."""
    base, merged = (read_tensors(path) for path in (check.base, check.merged))
    return all(key in merged and merged[key].shape == tensor.shape for key, tensor in base.items())


def compare(base, merged, adapters: list[Member], texts: list[list[int]]) -> list[ComparedLogits]:
    """Make all comparisons. One model is in memory at a time."""
    dtype = read_tensors(merged)["head.weight"].dtype
    dtype = dtype if dtype in NAMES else torch.float32
    kernel, _ = ops.choose("auto", "cpu", Arch.detect(read_tensors(base)).head_size)

    def logits(path, precision: torch.dtype, files=()):
        model = RWKV.load(path, precision, kernel=kernel).eval()
        blended = blend(model, files)
        return model, blended, logits_of(model, texts)

    _, _, of_base = logits(base, torch.float32)
    model, blended, live = logits(base, torch.float32, adapters)
    rows = [ComparedLogits(EFFECT, "fp32", distance(of_base, live))]
    del of_base
    merge_blended(model, blended)
    rows.append(ComparedLogits(UNROUNDED, "fp32", distance(live, logits_of(model, texts))))
    del model, blended
    rows.append(ComparedLogits(MERGED, "fp32", distance(live, logits(merged, torch.float32)[2])))
    if dtype != torch.float32:
        _, _, live_short = logits(base, dtype, adapters)
        rows.append(ComparedLogits(MERGED, NAMES[dtype], distance(live_short, logits(merged, dtype)[2])))
        rows.append(
            ComparedLogits(f"live in fp32 -> live in {NAMES[dtype]}", "both", distance(live, live_short))
        )
    return rows


def probe_problems(rows: list[ComparedLogits]) -> list[str]:
    """Describe a difference between the unrounded merge and the live model."""
    problems = []
    for row in rows:
        found, allowed = row.distance, TOLERANCE * row.distance.max_logit
        # `not <=`, so that a NaN is a problem, too
        if row.what == UNROUNDED and not found.max_logit_difference <= allowed:
            problems.append(
                "the merged model differs from the base with its adapters unmerged: the logits differ by"
                f" {found.max_logit_difference:.3g}, and {allowed:.3g} is allowed"
            )
    return problems


def table(rows: list[ComparedLogits], tokens: int, problems: list[str]) -> list[str]:
    """Write the comparisons for people, with their meaning."""
    if not rows:
        return ["the logits were not compared, because the merged file has other tensors than the base"]
    lines = [
        f"logits on {tokens} tokens; live is the base with its adapters unmerged, as in training",
        f"  {'':<36}  {'in':<5}  max |dlogit|   mean KL    max KL  same top-1",
    ]
    for row in rows:
        d = row.distance
        lines.append(
            f"  {row.what:<36}  {row.precision:<5}  {d.max_logit_difference:>12.3g}  {d.mean_kl:>8.2g} "
            f" {d.max_kl:>8.2g}  {100 * d.top1_agreement:>9.1f} %"
        )
    effect, exact, merged = (row.distance for row in rows[:3])
    lines += [f"wrong: {problem}" for problem in problems if problem in probe_problems(rows)]
    if problems:
        return [*lines, "the merged file is not right: see the lines that begin with wrong"]
    within = exact.max_logit_difference / exact.max_logit
    lines += [
        "the merged file is right: it is what was trained, rounded once",
        f"  before the rounding its logits are the live ones, to {within:.1g} of the largest",
    ]
    if effect.mean_kl:
        share = percent(merged.mean_kl / effect.mean_kl)
        lines.append(f"  the rounding changes the answers by {share} of what the adapters do, by mean KL")
    return lines


if __name__ == "__main__":
    main()
