"""Parse commands with the programs' own parsers and go no further: python -m tests.parse_commands < COMMANDS

COMMANDS is a JSON list of [words after `python`, whether the command is complete]. Of an incomplete one the
flags are looked up only. The answer is a JSON list of [what is wrong or "", the program's flags].
"""

import argparse
import contextlib
import io
import json
import pathlib
import re
import runpy
import sys

from rwkv_miss.errors import UserError

# the words that stand for a user's own
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*(\.\w+)?|\.\.\.|…")


class Stopped(BaseException):
    """A program has parsed its command line."""


def option_strings(parser):
    """The flags of a parser and of its subcommands."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                found |= option_strings(subparser)
    return found


@contextlib.contextmanager
def stopping(complete, seen):
    """No program goes on after its command line, which is parsed if it is complete."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        seen["flags"] = option_strings(self)
        if complete:
            seen["values"] = parse_args(self, args, namespace)
        raise Stopped

    argparse.ArgumentParser.parse_args = stop
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_args = parse_args


def run(words, complete):
    """(what the program's parser tells, what it printed on stderr)."""
    seen, errors = {}, io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        with stopping(complete, seen), contextlib.suppress(Stopped, SystemExit):
            if words[0] == "-m":
                sys.argv = words[1:]
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            elif words[0] == "train.py":
                from src.config import parse

                parse(words[1:])
            else:
                sys.argv = words
                runpy.run_path(words[0], run_name="__main__")
    return seen, errors.getvalue().strip()


def settled(values):
    """UserError for values that the settings refuse; placeholders pass."""
    from src.config import FIELDS, settle

    answers = {
        name: value
        for name, value in vars(values).items()
        if name in FIELDS and not PLACEHOLDER.fullmatch(str(value))
    }
    settle(answers)


def has_parser(words):
    """Tell whether a program reads a command line."""
    if words[0] != "-m":
        return True
    base = pathlib.Path(*words[1].split("."))
    source = base / "__main__.py" if base.is_dir() else base.with_suffix(".py")
    return re.search(r"[Pp]arser\(|parse_flags\(", source.read_text(encoding="utf-8")) is not None


def checked(words, complete):
    """(what is wrong with a command, or "", and the flags of its program)."""
    if "--help" in words or "--version" in words:
        complete = False
    given = {word.partition("=")[0] for word in words[1:] if re.match(r"--[a-z]", word)}
    if not has_parser(words):
        return f"takes no flags, got {', '.join(sorted(given))}" if given else "", []
    seen, errors = run([word for word in words if word not in ("...", "…")], complete)
    flags = sorted(seen.get("flags", ()))
    unknown = given.difference(flags)
    if not flags:
        return errors or "its parser was not reached", flags
    if unknown:
        return f"unknown flags {', '.join(sorted(unknown))}", flags
    if complete and "values" not in seen:
        return errors or "it does not parse", flags
    if complete and words[0] == "train.py":
        settled(seen["values"])
    return "", flags


def main():
    answers = []
    for words, complete in json.load(sys.stdin):
        try:
            answers.append(checked(words, complete))
        except (ImportError, OSError, UserError) as error:
            answers.append([str(error), []])
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
