"""Adapter to EleutherAI's lm-evaluation-harness for a model of this project: the optional extra lm-eval.

Only scripts/lm_eval.py imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask

from rwkv_miss.errors import UserError
from rwkv_miss.progress import Progress

from ..data.bos import with_bos
from ..data.chat_template import Template
from ..data.formats import read_records
from ..data.rwkv_template import DEFAULT
from ..inference.request import Request
from ..inference.sampling import GREEDY, Sampling
from ..model import RWKV
from .answering import completed, engine_for, seed_of
from .likelihood import log_likelihoods

MAX_TOKENS = 256  # limit of an answer if a task gives none, as in the harness's own models


class HarnessModel(LM):
    """Model for the harness. There is no longest context: the state carries all of it.

    Every text begins with the ids `bos`. Without them a text with nothing before it is scored after the end
    of a document, as texts stand in RWKV's training data. Sampled answers draw from `seed` and the place of
    their request.
    """

    def __init__(
        self, model: RWKV, tokenizer, template: Template = DEFAULT, bos: tuple[int, ...] = (), seed: int = 0
    ):
        super().__init__()
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.bos, self.seed = bos, seed

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return (ln p(continuation | context), whether greedy decoding gives it) of each request.

        A request is (context, continuation).
        """
        return log_likelihoods(self.model, [self._tokens(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Compute ln p of each whole text (text,)."""
        pairs = [self._tokens("", *request.args) for request in requests]
        return [total for total, _ in log_likelihoods(self.model, pairs)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Generate the answer to each request, without the text that ended it.

        A request is (context, {"until": texts, "max_gen_toks": number}), greedy unless it has "do_sample".
        """
        own_requests = [self._request(*request.args, place) for place, request in enumerate(requests)]
        answers = [""] * len(own_requests)
        engine = engine_for(self.model, self.tokenizer, len(own_requests))
        with Progress("answering", len(own_requests), "answers") as bar:
            for place, answer in completed(engine, own_requests, bar):
                answers[place] = answer.text
        return answers

    def _request(self, context: str, options: dict[str, Any], place: int) -> Request:
        until = options.get("until") or []
        return Request(
            self._begun(self.tokenizer.encode(context)),
            options.get("max_gen_toks", MAX_TOKENS),
            _sampling(options),
            seed_of(self.seed, place),
            (until,) if isinstance(until, str) else tuple(until),
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Write the conversation by this project's template, up to where an answer begins."""
        return "".join(piece for piece, _ in self.template.segments(chat_history, ask=add_generation_prompt))

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.template.record

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name

    def _tokens(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode the two as they stand in one text.

        Space between them belongs to the continuation, as in the harness's own models.
        """
        text, border = context + continuation, len(context.rstrip())
        before, whole = self.tokenizer.encode(text[:border]), self.tokenizer.encode(text)
        if whole[: len(before)] != before:  # a token crosses the border
            whole = before + self.tokenizer.encode(text[border:])
        return self._begun(before), whole[len(before) :]

    def _begun(self, ids: list[int]) -> list[int]:
        """Return the ids of a context, with at least one."""
        return with_bos(ids, self.bos) or list(self.tokenizer.eod)


def _sampling(options: dict[str, Any]) -> Sampling:
    """Choose the sampling of a request; Hugging Face's defaults are 1, 1 and no top_k."""
    if not options.get("do_sample"):
        return GREEDY
    return Sampling(options.get("temperature", 1.0), options.get("top_p", 1.0), options.get("top_k") or 0)


class Lambada(ConfigurableTask):
    """LAMBADA task from a local file of rows {"text"}.

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
