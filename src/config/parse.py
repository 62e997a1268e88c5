"""Parsing of the settings, and writing them as config.yaml and as the full command.

A flag comes before the YAML file, the file before the preset. A launcher fills in what none of them gives.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from rwkv_miss.adapter import METHODS
from rwkv_miss.errors import Parser, UserError, did_you_mean, similar_path
from rwkv_miss.files.hub_names import recorded
from rwkv_miss.flags import add_flags

from ..common.bounded_files import read_settings
from ..common.files import write_text
from ..common.first_process import is_first_process
from ..common.option import AUTO
from .adapter_options import METHOD_ALIASES, TARGET_NAMES
from .launcher import drop_local_rank, follow_launcher
from .loss_rules import check_by_hand
from .schema import (
    CHOSEN,
    FIELDS,
    NAMES,
    PAPER,
    PRESETS,
    PUBLISHED,
    SCRIPT_NOTES,
    Config,
    Settled,
    read,
    type_of,
    uncommon_bounds,
)
from .validate import validate

# values of other projects' scripts for flags that are here too; legacy/ knows what they mean
FOREIGN = {
    "load_model": "0",
    "loss_mask": "none|pad|qa|se|",
    "op": "fla|triton",
    "optimizer": "none|adam|adam8bit|adamw_8bit|adamw_bnb_8bit|",
    "peft": "|".join(METHOD_ALIASES),
    "quant": "0|1|4bit|fp4|fp8|",
    "random_seed": "-1",
    "strategy": "single[-_]device",
    "train_parts": r"none|\[.*",
}
# parts of --version in scripts for other models -> the model
OTHER_MODELS = {"x05": "RWKV-5", "xa07": "ARWKV or its kin, with RWKV-7's time mix in another model's blocks"}
MOST_NOTES = 3  # notes that are printed although they change nothing in the result
EXPECTED = {bool: "0 or 1", int: "a whole number", float: "a number such as 0.5", str: "a text"}


def parse(argv: list[str]) -> Config:
    """Parse the command line of train.py.

    Notes about a script of another trainer are printed if they change the result, or are few. Else the run
    writes them into its folder.
    """
    parser = flag_parser("python train.py", "Fine-tune RWKV-6 and RWKV-7 checkpoints.")
    words, differences, translations = _of_today(parser, drop_local_rank(argv))
    _print_notes(differences)
    try:
        config = follow_launcher(settle(vars(parser.parse_args(words))))
        validate(config)
    except UserError:
        _print_notes(translations)  # the error may be about a flag that only the translation gave
        raise
    if len(translations) <= MOST_NOTES or config.init_only or config.verbose:
        _print_notes(translations)
        return config
    path = os.path.join(config.proj_dir, SCRIPT_NOTES)
    _print_notes(
        [
            f"{len(translations)} more notes change nothing in the result; the run writes them to {path},"
            " and --verbose prints them"
        ]
    )
    return dataclasses.replace(config, script_notes=(*differences, *translations))


class _GivenOnce(argparse.Action):
    """A flag that stands once in a command line: of two files one would be dropped."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if hasattr(namespace, self.dest):
            raise UserError(
                f"{option_string} is given twice, {getattr(namespace, self.dest)} and {values}; put the"
                " settings of one into the other, or give them as flags"
            )
        setattr(namespace, self.dest, values)


def flag_parser(prog: str, description: str) -> Parser:
    """Make a parser with a flag for every setting, to which a program may add its own."""
    parser = Parser(prog=prog, description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--config",
        metavar="FILE",
        action=_GivenOnce,
        help="YAML with any of these settings; an earlier run's config.yaml is one",
    )
    add_flags(parser, Config, _keywords)
    return parser


def _keywords(field: dataclasses.Field) -> dict[str, Any]:
    """Return the keywords of a setting's flag. Its value stays a text, as those of YAML become typed, too."""
    kind = type_of(field.name)
    default = "chosen" if field.default is AUTO else field.metadata["written"]
    default = f"{default:g}" if isinstance(default, bool | float) else default
    default = "" if default in ("", {}) else f" [{default}]"
    bounds = f"; {text}" if (text := uncommon_bounds(field.name)) else ""
    help = (field.metadata["help"] + bounds + default).replace("%", "%%")
    # --verbose is --verbose 1
    alone = {"nargs": "?", "const": "1"} if kind is bool else {}
    return {"metavar": kind.__name__, "help": help, **alone}


def read_flags(parser: Parser, argv: list[str]) -> dict[str, Any]:
    """Parse a command line to values by name; older spellings are translated, and the user is told."""
    words, differences, translations = _of_today(parser, argv)
    _print_notes([*differences, *translations])
    return vars(parser.parse_args(words))


def _of_today(parser: Parser, argv: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Translate older spellings into (words, notes about another result, other notes)."""
    if _is_of_today(parser, argv):
        return argv, [], []
    from .legacy import translate  # seven files that other starts need not read

    words, notes = translate(argv)
    return words, notes.differences, notes.translations


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes if is_first_process() else ():
        print("note:", note)


def _is_of_today(parser: Parser, argv: list[str]) -> bool:
    """Tell whether a command line has this parser's flags alone, each with one value, and none of FOREIGN."""
    name, has_value = "", True
    for word in argv:
        is_flag = word.startswith("--")
        flag, equals, value = word.partition("=") if is_flag else ("", "=", word)
        if is_flag:
            if flag not in parser._option_string_actions:
                return False
            name, has_value = flag.removeprefix("--"), False
        if equals:
            if has_value or name in FOREIGN and re.fullmatch(FOREIGN[name], value):
                return False
            has_value = True
    return True


def settle(given: dict[str, Any]) -> Config:
    """Make the settings of parsed flags, `config` among them, without validate()."""
    config = _merged(given)
    check_by_hand(config)
    return config


@dataclasses.dataclass(frozen=True)
class Recorded:
    """The settings in the config.yaml of a run. Code that they name is not run."""

    settings: Settled
    chosen: Mapping[str, str]  # setting that was left to the program -> the reason of its choice


def recorded_settings(path: str) -> Recorded:
    """Read a run's config.yaml. What was chosen is no longer AUTO, also where it is 0."""
    config = _merged({"config": path})
    reasons = _load_yaml(path).get(CHOSEN)
    reasons = reasons if isinstance(reasons, dict) else {}
    chosen = {name: why for name, why in reasons.items() if name in FIELDS and isinstance(why, str)}
    config = dataclasses.replace(config, **{name: config.written(name) for name in chosen})
    return Recorded(config.settled(), chosen)


def _merged(given: dict[str, Any]) -> Config:
    """Merge the settings of all places."""
    file = given.get("config")
    layers = [("command line", {name: value for name, value in given.items() if name != "config"})]
    if file:
        layers.append((file, read_yaml(file)))
    values, origins = _first_of_each(layers)
    if values.get("preset"):
        values, origins = _first_of_each([*layers, (f"preset {values['preset']}", _preset_values(values))])
    return _config_of(values, origins)


def checked(config: Config) -> Config:
    """Return the settings of a Config that was made in Python, of their types. UserError if one is wrong."""
    values = {name: getattr(config, name) for name in FIELDS if not config.is_automatic(name)}
    for name, value in values.items():
        typed = _typed_value(name, value)
        # a text may be more than one: a name of the hub has the local file
        if not isinstance(value, str) or value != typed:
            values[name] = typed
    config = dataclasses.replace(_config_of(values, config.origins), script_notes=config.script_notes)
    validate(config)
    return config


def _config_of(values: Mapping[str, Any], origins: Mapping[str, str]) -> Config:
    """Typed values as settings: words for no number have their meaning."""
    config = Config(**{name: read(name, value) for name, value in values.items()}, origins=origins)
    if config.lr_init != PAPER:
        return config
    origins = {**origins, "lr_init": f"{origins.get('lr_init', 'given')}: {PUBLISHED} {config.peft}"}
    return dataclasses.replace(config, lr_init=config.published_rate, origins=origins)


def read_yaml(path: str) -> dict[str, Any]:
    """Read the settings in a YAML file, without the reasons that a run's config.yaml has, too."""
    values = _load_yaml(path)
    values.pop(CHOSEN, None)
    spelled: dict[str, str] = {}
    for name in values:
        if name not in NAMES:
            raise UserError(f"{path}: unknown setting {name!r}{did_you_mean(str(name), NAMES)}")
        if (first := spelled.setdefault(NAMES[name], name)) != name:
            raise UserError(f"{path}: {first} and {name} are one setting; keep one of them")
    return values


def _load_yaml(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        if not os.path.isdir(path):
            raise UserError(f"config file {path} does not exist{similar_path(path)}")
        inside = os.path.join(path, "config.yaml")
        raise UserError(
            f"config file {path} is a folder; give {inside if os.path.isfile(inside) else 'a file'}"
        )
    try:
        values = read_settings(path) or {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise UserError(f"{path} is not valid YAML: {error.problem}, line {line}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as settings: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `name: value` lines, got {type(values).__name__}")
    return values


def _first_of_each(layers: list[tuple[str, dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Take values in order of precedence, converted to their types, with their origins."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        for name, value in layer.items():
            if NAMES[name] not in values:
                try:
                    values[NAMES[name]] = _typed_value(NAMES[name], value)
                except UserError as error:
                    raise error if origin == "command line" else UserError(f"{origin}: {error}") from None
                origins[NAMES[name]] = origin
    return values, origins


def _preset_values(values: dict[str, Any]) -> dict[str, Any]:
    common, by_method = PRESETS[values["preset"]]
    method = values.get("peft", Config.peft)
    if method not in by_method:
        raise UserError(
            f"preset {values['preset']} has settings for {', '.join(by_method)}, not for --peft {method}"
        )
    return {**common, "peft_config": by_method[method]}


def _typed_value(name: str, value: Any) -> Any:
    """Convert a flag's text or a YAML value to the field's own type."""
    kind = type_of(name)
    if kind is dict:
        return _read_mapping(name, value)
    words = FIELDS[name].metadata["words"]
    try:
        if value is None or isinstance(value, (dict, list)):
            raise ValueError
        text = str(value)
        value = words[text.lower()] if text.lower() in words else _read_scalar(text, kind)
    except (ValueError, KeyError):
        expected = " or ".join([EXPECTED[kind], *words])
        raise UserError(f"--{name} {value}: expected {expected}") from None
    if name == "peft":
        value = METHOD_ALIASES.get(value, value)
    choices = (*sorted(METHODS), "none") if name == "peft" else FIELDS[name].metadata["choices"]
    if choices and value not in choices:
        for part, model in OTHER_MODELS.items() if name == "version" else ():
            if part in value:
                raise UserError(
                    f"--version {value} is {model}, which is not supported; RWKV-6 (x060) and RWKV-7 (x070)"
                    " are"
                )
        known = [c for c in choices if c]
        meant = did_you_mean(str(value).lower(), known)
        raise UserError(f"--{name} {value}: expected one of {', '.join(known)}{meant}")
    return value


def _read_scalar(text: str, kind: type) -> str | bool | int | float:
    """Convert a text. Raises ValueError or KeyError if it is none of this kind."""
    if kind is str:
        return text
    if kind is bool:
        return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
    return _finite_number(text, kind)


def _finite_number(text: str, kind: type) -> int | float:
    """Convert a text to a finite number of this kind, or raise ValueError. 1e3 is an int, too."""
    if kind is int:
        with contextlib.suppress(ValueError):
            return int(text)  # with all its digits, which a float would not keep
    number = float(text)
    if not math.isfinite(number) or kind(number) != number:
        raise ValueError
    return kind(number)


def _read_mapping(name: str, value: Any) -> dict[str, Any]:
    """Read {"r": 64} as a mapping, JSON or r=64,alpha=32; a name alone has the setting's bare value."""
    if isinstance(value, dict):
        return {str(name): given for name, given in value.items()}
    text = str(value).strip()
    if text.startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"--{name} {text}: not valid JSON ({error.msg} at column {error.colno})"
            ) from None
    options: dict[str, Any] = {}
    bare = FIELDS[name].metadata["bare"]
    for pair in filter(None, (part.strip() for part in text.split(","))):
        key, sign, raw = pair.partition("=")
        if not sign and bare is None:
            raise UserError(f"--{name} {text}: expected JSON or key=value pairs, got {pair!r}")
        if key in options:
            raise UserError(f"--{name} {text}: {key} is given twice; keep one")
        if not sign:
            options[key] = bare
        else:
            options[key] = raw.split("+") if key in TARGET_NAMES else _json_or_text(raw)
    return options


def _json_or_text(text: str) -> Any:
    try:
        return json.loads({"True": "true", "False": "false"}.get(text, text))
    except json.JSONDecodeError:
        return text


def save(config: Config, path: str) -> None:
    """Write the settings as YAML, each with its origin; then, under `chosen`, why the program chose what was
    left to it. The file works as --config.
    """
    chosen = {
        name: reason
        for name in FIELDS
        for kind, _, reason in [config.origin_of(name).partition(": ")]
        if kind == CHOSEN
    }
    lines = [
        f"{_yaml({name: recorded(config.written(name))})}  # {origin}"
        for name in FIELDS
        for origin in [CHOSEN if name in chosen else config.origin_of(name)]
    ]
    if chosen:
        lines += [f"{CHOSEN}:", *(f"  {_yaml({name: reason})}" for name, reason in chosen.items())]
    write_text(path, "\n".join(lines) + "\n")


def _yaml(pair: dict[str, Any]) -> str:
    """Write a name and its value as a line."""
    return yaml.safe_dump(pair, default_flow_style=True, width=10**6, allow_unicode=True).strip()[1:-1]


def command(config: Config) -> str:
    """Write the command that repeats this run from its beginning, with every setting that is no default."""
    words = ["python", "train.py"]
    default = Config()
    # --epoch_steps alone is one epoch
    left_out = {"resume", "epoch_count"} if config.epoch_steps and config.epoch_count == 1 else {"resume"}
    for name in FIELDS:
        value = recorded(config.written(name))
        if name not in left_out and value != default.written(name):
            text = _flag_text(value)
            # a value that begins like a flag
            words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return shlex.join(words)


def _flag_text(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    return str(int(value) if isinstance(value, bool) else value)
