"""A model of this project as one of EleutherAI's lm-evaluation-harness, the optional extra lm-eval.

Only scripts/lm_eval.py imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask

from rwkv_miss.errors import UserError

from ..data.chat_template import Template
from ..data.formats import read_records
from ..data.leading_token import with_leading
from ..data.rwkv_template import DEFAULT
from ..model import RWKV
from .accuracy import greedy
from .likelihood import log_likelihoods

MAX_TOKENS = 256  # of an answer for which a task gives no limit, as in the harness's own models


class HarnessModel(LM):
    """Scores and generates for the harness. There is no longest context: the state carries all of it.

    Every text begins with the ids `bos`. Without them a text with nothing before it is scored after the end
    of a document, which is what stands before a text in RWKV's training data.
    """

    def __init__(self, model: RWKV, tokenizer, template: Template = DEFAULT, bos: tuple[int, ...] = ()):
        super().__init__()
        self.model, self.tokenizer, self.template, self.bos = model, tokenizer, template, bos

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(ln p(continuation | context), whether greedy decoding gives it) of each request.

        A request is (context, continuation).
        """
        return log_likelihoods(self.model, [self._tokens(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """ln p of each whole text (text,)."""
        pairs = [self._tokens("", *request.args) for request in requests]
        return [total for total, _ in log_likelihoods(self.model, pairs)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The greedy answer to each request, without the text that ended it.

        A request is (context, {"until": texts, "max_gen_toks": number}).
        """
        # requests with the same stops and the same limit are answered together
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for i, request in enumerate(requests):
            _, options = request.args
            groups.setdefault(_stops_and_limit(options), []).append(i)
        answers = [""] * len(requests)
        for (stops, limit), members in groups.items():
            prompts = [self._begun(self.tokenizer.encode(requests[i].args[0])) for i in members]
            made = greedy(self.model, self.tokenizer, prompts, limit, stops=stops)
            for i, answer in zip(members, made, strict=True):
                answers[i] = answer.text
        return answers

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as this project's template writes it, asking for an answer."""
        return "".join(piece for piece, _ in self.template.segments(chat_history, ask=add_generation_prompt))

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.template.record

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name

    def _tokens(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of the two as they stand in one text.

        Space between them belongs to the continuation, as in the harness's own models.
        """
        text, border = context + continuation, len(context.rstrip())
        before, whole = self.tokenizer.encode(text[:border]), self.tokenizer.encode(text)
        if whole[: len(before)] != before:  # a token reaches over the border
            whole = before + self.tokenizer.encode(text[border:])
        return self._begun(before), whole[len(before) :]

    def _begun(self, ids: list[int]) -> list[int]:
        """The ids of a context, which has at least one."""
        return with_leading(ids, self.bos) or list(self.tokenizer.eod)


def _stops_and_limit(options: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """What ends the answer to a request. UserError for one whose answer is sampled."""
    if options.get("do_sample") and options.get("temperature", 1.0) > 0:
        raise UserError(
            f"the task samples its answers ({options}), they are greedy here; use a task with"
            " do_sample: false"
        )
    until = options.get("until") or []
    stops = (until,) if isinstance(until, str) else tuple(until)
    return stops, options.get("max_gen_toks", MAX_TOKENS)


class Lambada(ConfigurableTask):
    """LAMBADA from a local file of rows {"text"}.

    As in the harness's task lambada_openai, the last word of each text is asked for.
    """

    NAME = "lambada_local"

    def __init__(self, data_file: str):
        self.rows = [{"text": row["text"]} for _, row in read_records(data_file) if "text" in row]
        if not self.rows:
            raise UserError(f'--data_file {data_file} has no row {{"text": ...}}, which LAMBADA consists of')
        super().__init__(
            config={
                "task": self.NAME,
                "test_split": "test",
                "output_type": "loglikelihood",
                "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
                "doc_to_target": "{{' '+text.split(' ')[-1]}}",
                "metric_list": [
                    {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                    {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                ],
            }
        )

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.dataset = {"test": Dataset.from_list(self.rows)}
