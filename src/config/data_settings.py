"""Settings of a run about its data and their tokens. schema.py has the others."""

from __future__ import annotations

import dataclasses

from ..common.option import opt

HERMES, MARKDOWN = "hermes", "markdown"
TOOL_STYLES = ("json", "signatures", MARKDOWN, HERMES)


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """First settings of Config, in the order of the docs."""

    load_model: str = opt(
        "",
        "the base model: a .pth, a Hugging Face folder, or hf://OWNER/NAME[/FILE][@REVISION] of the"
        " Hugging Face hub. Empty: a new model with the sizes of --version, --n_layer and --n_embd",
        file=True,
    )
    data_file: str = opt(
        "",
        "the training data: JSONL, JSON, CSV, TSV, parquet, Arrow, .txt, binidx, a folder of such"
        " files, OWNER/NAME of a Hugging Face data set, or hf://OWNER/NAME/FILE of one. Several files with"
        " weights: a.jsonl:2,b.csv:0.5 reads every row of a.jsonl twice and half of b.csv",
        file=True,
    )
    sft_field: str = opt(
        "",
        "which columns to read, where a row fits several layouts: text, messages, question,answer or"
        " instruction,input,output",
    )
    sft_split: str = opt(
        "train",
        "which split to read of a Hugging Face data set, or of a folder whose files are named for splits",
    )
    largest_row: int = opt(
        16,
        "the largest row that is used, in MB (10^6 bytes, unpacked); a larger one is a bad row. A row takes"
        " 60 to 130 times its size in memory while it is read",
        low=1,
        high=2000,
        operator=True,
    )
    on_bad_row: str = opt(
        "stop",
        "what to do with a row that cannot be used. stop: end with its file and line. skip: leave it"
        " out and count it",
        choices=("stop", "skip"),
    )
    proj_dir: str = opt(
        "out", "the run's folder, for adapter.pth, metrics.jsonl, config.yaml and checkpoints/", operator=True
    )
    tokenizer: str = opt(
        "auto",
        "auto, world, bytes, utf16, a tokenizer.json, or a vocabulary file in World format. auto: the"
        " tokenizer that --load_model records; else the one in its Hugging Face folder; else world, for"
        " a model with the World vocabulary",
        file=True,
    )
    eod: str = opt("", "the text of the end-of-document token, for a tokenizer file that does not name it")

    template: str = opt(
        "auto",
        "how conversations are written: rwkv, a mode of the G1 models (docs/templates.md lists them),"
        " alpaca, or a Jinja file with Hugging Face's conventions. auto: the template that --load_model"
        " records, else rwkv",
        file=True,
    )
    tool_style: str = opt(
        "auto",
        "how rwkv and its modes write tools and their calls: json, signatures, markdown or hermes."
        " auto: the style that --load_model records; else json with the World vocabulary, hermes with"
        " others",
        choices=("auto", *TOOL_STYLES),
        automatic=True,
    )
    loss_mask: str = opt(
        "assistant",
        "which tokens are trained. assistant: the assistant's turns, completions, and plain text as a"
        " whole. all: everything. A marker such as Assistant: trains the text after it, up to the next"
        " turn. START...END trains the text between the two. The end of a document is always trained",
    )
    think_weight: float = opt(
        1.0,
        "the loss of the text between <think> and </think> is multiplied by this. The tags keep the"
        " weight of the answer. 0: thoughts are read and not trained",
        low=0,
        high=100,
    )
    prompt_weight: float = opt(
        0.0,
        "the weight in the loss of tokens that --loss_mask leaves out, such as questions. 0: none",
        low=0,
        high=100,
    )
    bos: str = opt(
        "recorded",
        "the token that every document begins with. It is never trained. none: no token. auto: the"
        " end-of-document token, 0 in World, as in BlinkDL's evaluations. A number: the token of this"
        " id. recorded: the BOS that --load_model records, else none",
    )
    data_cache: str = opt(
        "auto",
        "folder for tokenised data, and for what a reference or a teacher says of them. auto: rwkv-miss/data"
        " in the user's cache folder. none: tokenise every time, and keep the reference's in the run's"
        " folder",
        operator=True,
    )
