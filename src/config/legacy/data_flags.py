"""Data flags of RWKV-LM's and RWKV-PEFT's scripts, in the flags of `Config`."""

from __future__ import annotations

from collections.abc import Mapping

from rwkv_miss.errors import UserError

from .flag_values import integer_of, is_on, of_2026, product, stage, value
from .notes import Notes
from .preference_flags import SWITCHES

# RWKV-PEFT's masks, and what each of them trains. With --data_type sft it reads none, and trains the answers.
LOSS_MASKS = {
    **dict.fromkeys(("none", ""), ("all", "trains every token; padding, which is trained there, is not")),
    "pad": ("all", "trains every token but the padding"),
    "qa": (
        "Assistant:",
        "trains what follows Assistant: until the next turn; a document without this word is trained whole"
        " there, and only its end here",
    ),
}
USUAL_BATCH, USUAL_EPOCHS = 12, 500  # RWKV-PEFT's defaults until 2025


def loss_mask(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Translate --loss_mask."""
    mask = value(kept, "loss_mask")
    if mask == "se":
        raise UserError(
            "--loss_mask se marks by token ids; here a mask is given as text: --loss_mask START...END"
        )
    if mask not in LOSS_MASKS:
        return []
    given = f"--loss_mask {mask or repr('')}"
    if old.get("data_type") == "sft":
        notes.translations.append(
            f"{given} is ignored with --data_type sft, there as well: the answers are trained"
        )
        return ["--loss_mask", "assistant"]
    today, meaning = LOSS_MASKS[mask]
    other = "; assistant trains the answers alone" if today == "all" else ""
    list_of = notes.translations if mask == "pad" else notes.differences
    list_of.append(f"{given} {meaning}: --loss_mask {today}{other}")
    return ["--loss_mask", today]


def epoch_steps(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Give --epoch_steps in optimizer steps. RWKV-PEFT counted forward passes, and from 2026 on documents."""
    given = integer_of(kept, "epoch_steps", 0)
    accumulate = product(kept, "accumulate_grad_batches")
    # Lightning splits an epoch of RWKV-PEFT over the devices
    shares = 1 if "layer_profile" in old else product(kept, "devices", "num_nodes")
    if given and of_2026(old, kept) and old.get("data_type") == "sft":
        notes.differences.append(
            f"--epoch_steps {given} counts optimizer steps; there --data_type sft did not read it. Without it"
            " an epoch is all data once"
        )
    elif given and of_2026(old, kept):
        notes.differences.append(
            f"--epoch_steps {given} counts optimizer steps; there it kept the first {given} documents and"
            " dropped the rest. Without it an epoch is all data once"
        )
    elif given and accumulate * shares > 1 and stage(old) == "0":
        steps = max(1, given // (accumulate * shares))
        split = f" of {shares} devices" if shares > 1 else ""
        notes.translations.append(
            f"--epoch_steps {given} counted forward passes{split} there, of which a step has"
            f" {accumulate * shares}: --epoch_steps {steps}"
        )
        return ["--epoch_steps", str(steps)]
    return []


def same_documents(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Note that RWKV-PEFT until 2025 reads the same documents in all epochs."""
    steps, epochs = integer_of(kept, "epoch_steps", 0), integer_of(kept, "epoch_count", USUAL_EPOCHS)
    in_order = old.get("dataload") in ("pad", "only") or old.get("data_type") in ("jsonl", "sft")
    if steps and epochs > 1 and in_order and not of_2026(old, kept):
        count = steps * integer_of(kept, "micro_bsz", USUAL_BATCH)
        notes.differences.append(
            f"all epochs read the first {count} documents there; here they go on through all data. If there"
            " are more, give these alone as --data_file"
        )
    return []


def rows(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Note that a row holds other text than in the other trainer."""
    if any(is_on(old, loss) for loss in SWITCHES):  # rows of pairs, or of drawn answers
        return []
    if stage(old) != "0":
        notes.differences.append(
            "a row went on over the ends of documents there; here documents that share a row do not see each"
            " other"
        )
    elif old.get("dataload") in ("get", "only"):
        notes.differences.append(
            f"--dataload {old['dataload']} is ignored: a row began anywhere in the text there, and begins"
            " with a document here"
        )
    elif value(kept, "packing") is None:
        notes.differences.append(
            "a row was one document there; here documents share rows, so that as many steps are more passes:"
            " the plan has both numbers, and --packing 0 does as there"
        )
    return []


def jsonl(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Note that documents of --data_type jsonl have an end."""
    if old.get("data_type") == "jsonl" and stage(old) == "0":
        notes.differences.append(
            "--data_type jsonl adds no end to a document there, and drops what is beyond --ctx_len; here a"
            " document has an end token, and a long text becomes several documents"
        )
    return []


def held_out(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Note that documents are held out."""
    if value(kept, "eval_split") is None and value(kept, "eval_file") is None:
        notes.differences.append(
            "of 100 documents or more some are held out here; --eval_split 0 trains all, as there"
        )
    return []


def alpaca(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Note that the rows of --data_type sft have another form."""
    if old.get("data_type") == "sft" and value(kept, "template") is None:
        notes.differences.append(
            "--data_type sft wrote Alpaca's form (### Instruction:) there, a line break and \\x17 after an"
            " answer; here it is User: and Assistant:. --template alpaca has that form without this end"
        )
    return []
