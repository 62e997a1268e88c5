"""Check whether a merged file equals base + adapters.

python -m scripts.verify_merge --base base.pth --adapter adapter.pth --merged merged.pth

Every tensor is compared bit for bit, and the logits of a short text are compared with those of the base with
its adapters unmerged.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m scripts.verify_merge")

from src.common.startup import importing, naming_missing_packages

with importing():
    import torch

    from rwkv_miss.errors import UserError, one_line_errors, printable
    from rwkv_miss.files.checkpoint import Arch
    from rwkv_miss.files.hub import with_local_files
    from rwkv_miss.files.model_files import is_file_or_folder, read_tensors
    from rwkv_miss.flags import flag, flags_of, options, parse_flags
    from rwkv_miss.merging.cli import RECORDED, Output, Parts, weights_flag
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


@options
class Flags(Parts):
    """Flags of this program."""

    weights: list[float] | None = weights_flag(RECORDED)
    merged: str = flag(file=True)
    text: str | None = flag(
        None,
        "a file with the text to compare logits on; default: src/evaluation/forgetting.txt, short and"
        " of four kinds",
    )
    tokens: int = flag(
        256, "number of tokens to read, the first of every kind of text; default %(default)s", low=1
    )
    tokenizer: str = flag("auto", "auto: as recorded in the files")
    eod: str = flag("")
    output: Output = flags_of(Output)


@dataclasses.dataclass(frozen=True)
class ComparedLogits:
    """Comparison of two models' logits, both computed in `precision`, unless `what` says otherwise."""

    what: str
    precision: str
    distance: Distance


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), naming_missing_packages():
        flags = parse_flags(Flags, argv, prog="python -m scripts.verify_merge", description=__doc__)
        flags = with_local_files(flags)
        check = check_merge(flags.base, flags.merged, flags.adapter, flags.weights, flags.hints)
        texts = probe_texts(flags)
        rows = compare(flags.base, flags.merged, check.adapters, texts) if comparable(check) else []
        problems = check.problems + probe_problems(rows)
        tokens = sum(map(len, texts))
        if flags.output.json:
            print(json.dumps(summary(check, rows, tokens, problems)))
        else:
            shown = None if flags.output.layers else TABLE_ROWS
            for line in [*check.lines(shown), *table(rows, tokens, problems)]:
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


def probe_texts(flags: Flags) -> list[list[int]]:
    """Encode each text of the probe."""
    arch = Arch.detect(read_tensors(flags.base))
    # other projects' adapters in folders record no tokenizer
    files = filter(is_file_or_folder, [*flags.adapter, flags.merged, flags.base])
    tokenizer = recorded_tokenizer(flags.tokenizer, flags.eod, arch.vocab_size, *files)
    if flags.text:
        texts = [tokenizer.encode(read_text(flags.text))]
    else:
        texts = list(sections(tokenizer).values())
    texts = [ids[: max(1, flags.tokens // len(texts))] for ids in texts if ids]
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
