"""Refusals of wrong flags and wrong requests: a text file for each room has every case and its answer.

    == chat messages=HI                 what is asked, and what all cases of this section have in common
    $ temperature="warm"                a case: the flags of a command, or the fields of a request
      400 temperature: got "warm", ...  its answer

`python -m tests.refusals` shows what differs, `--write` writes the answers anew. Add a case by its `$` line,
write, and read the diff: an answer says what was seen, what was expected and what to do.
"""

import contextlib
import difflib
import functools
import importlib
import io
import os
import pathlib
import re
import shlex
import tempfile

from rwkv_miss.errors import UserError

HERE = pathlib.Path(__file__).parent
ACCEPTED = "(accepted)"
FILES = {"rows.jsonl": '{"question": "q", "answer": "7"}\n', "notes.md": "# Notes of a user\n"}


def of_settings(kind):
    """Return answer(common, case) for flags of train.py or of the server, or for its settings file."""
    from demo import serve
    from src.config import parse

    def answer(common, case):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "run.yaml")
            path.write_text(case.replace(r"\n", "\n") + "\n")
            words = ["--config", str(path)] if kind == "run.yaml" else shlex.split(case)
            try:
                (serve.parse if kind == "serve" else parse)([*shlex.split(common), *words])
            except UserError as error:
                return str(error).replace(f"{folder}/", "")
        return ACCEPTED

    return answer


def of_program(kind):
    """Return answer(common, case) for the flags of a program, which runs in a folder of small files."""
    program = importlib.import_module(kind)

    def answer(common, case):
        here, said = os.getcwd(), io.StringIO()
        with tempfile.TemporaryDirectory() as folder:
            for name, text in FILES.items():
                pathlib.Path(folder, name).write_text(text)
            os.mkdir(f"{folder}/run")
            os.chdir(folder)
            try:
                with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                    program.main([*shlex.split(common), *shlex.split(case)])
                return ACCEPTED
            except (UserError, SystemExit) as error:
                return said.getvalue().removeprefix("error: ").strip() or str(error)
            finally:
                os.chdir(here)

    return answer


def of_requests(kind):
    """Return answer(common, case) for the fields of a request, as Python's keywords."""
    from src.serving.errors import Refused
    from src.serving.fields import read_object

    from .. import test_serving_apis, test_serving_protocol

    names = {"functools": functools} | vars(test_serving_protocol) | vars(test_serving_apis)

    def answer(common, case):
        try:
            if kind == "body":
                read_object(eval(case, names))
            else:
                fields = {**eval(f"dict({common})", names), **eval(f"dict({case})", names)}
                names[f"read_{kind}"](names["reader"](), fields)
        except Refused as refused:
            message = refused.as_object()["error"]["message"]
            told = refused.param is None or message.startswith(refused.param)
            where = "" if told else f"[{refused.param}] "
            code = "" if refused.code in (None, "invalid_value") else f"{refused.code} "
            return f"{refused.status} {code}{where}{message}"
        return ACCEPTED

    return answer


ROOMS = {
    "programs": of_program,
    "settings": of_settings,
    "serving": of_requests,
}


@functools.cache
def answers(room):
    """Return the text of a room's file as the program answers now, and the cases that were accepted."""
    text, wrong, ask, common = [], [], None, ""
    for line in (HERE / f"{room}.txt").read_text("utf-8").splitlines():
        if line.startswith("  "):
            continue
        text.append(line)
        if line.startswith("== "):
            kind, _, common = line[3:].partition(" ")
            ask = ROOMS[room](kind)
        elif line.startswith("$"):
            said = ask(common, line[2:])
            text.append("  " + re.sub(r"\s*\n\s*", " / ", said))
            wrong += [line] if said == ACCEPTED else []
    return "\n".join(text) + "\n", wrong


def differences(room):
    """Return a unified diff from the room's file to the answers of now."""
    there = (HERE / f"{room}.txt").read_text("utf-8").splitlines()
    return list(
        difflib.unified_diff(there, answers(room)[0].splitlines(), f"{room}.txt", "now", n=1, lineterm="")
    )
