"""Options of the commands: the parser, and the table of options that several commands share.

Nothing here imports torch, so that ``--help`` and a wrong command line are answered at once.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NoReturn

from plm.messages import nearest

if TYPE_CHECKING:
    from plm.data.schema import PairTable

ROWS = "JSONL(.gz), CSV or Parquet"
PROMPTS = "JSONL, CSV or Parquet with a key prompt, lines of text, or a recipe (.yaml) whose prompts are taken"
REWARDS = (
    "a recipe over SampledPairs, or YAML, as a file or as text, with its arguments: rewards (name -> {class_path, "
    "init_args}) and people (name -> weights of rewards; default: one for each reward)"
)


def stop(message: str) -> NoReturn:
    """Stop with one message and status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def integer(least: int) -> Callable[[str], int]:
    """Make the ``type`` of an option that takes an integer of at least ``least``."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer >= {least}, got {text}")
        return int(text)

    return parse


def assignment(example: str) -> Callable[[str], tuple[str, str]]:
    """Make the ``type`` of an option that takes two texts with an equals sign between them, such as NAME=COLUMN."""

    def parse(text: str) -> tuple[str, str]:
        name, equals, value = text.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"expected {example}, got {text!r}")
        return name, value

    return parse


def share(text: str) -> tuple[int, int]:
    """The ``type`` of an option that takes one of several equal shares of the work, such as 1/4."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    index, count = (int(part) for part in match.groups()) if match else (0, 0)
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f"expected I/K with 1 <= I <= K, got {text!r}")
    return index, count


def share_name(path: str, share: tuple[int, int]) -> str:
    """The name of a share's part of a file: ``out.jsonl`` of 2/12 -> ``out-02of12.jsonl``; the file itself of 1/1."""
    index, count = share
    stem, ending = os.path.splitext(path)
    return path if count == 1 else f"{stem}-{index:0{len(str(count))}}of{count}{ending}"


SHARED: dict[str, dict[str, Any]] = {
    "--attributes": {
        "nargs": "+",
        "default": [],
        "metavar": "COLUMN=WEIGHT",
        "type": assignment("COLUMN=WEIGHT"),
        "help": "columns whose weighted sum is the rating, e.g. helpful=1 polite=0.5",
    },
    "--best_of": {
        "type": integer(1),
        "metavar": "N",
        "help": "choose the best of N texts of --policy by the method's reward",
    },
    "--ckpt_path": {"metavar": "FILE", "help": "checkpoint written by plm fit"},
    "--columns": {
        "nargs": "+",
        "default": [],
        "metavar": "NAME=COLUMN",
        "type": assignment("NAME=COLUMN"),
        "help": "column of the files that holds NAME, e.g. user_id=uid; user_id= for none",
    },
    "--config": {"metavar": "FILE"},
    "--engine": {"choices": ("local", "ray"), "default": "local"},
    "--encoder_model": {"metavar": "NAME", "help": "name of the encoder there"},
    "--encoder_unchecked": {"action": "store_true"},
    "--encoder_url": {"metavar": "URL"},
    "--layout": {"metavar": "NAME", "help": "known layout of the files, such as argilla or helpsteer2: docs/data.md"},
    "--num_samples": {"type": integer(1), "metavar": "N"},
    "--on_error": {
        "choices": ("stop", "skip"),
        "default": "stop",
        "help": "what a malformed row does; skip leaves it out, counts it and writes it to a file of its own",
    },
    "--output": {"metavar": "FILE"},
    "--pairs": {"nargs": "+", "metavar": "FILE", "help": f"preference pairs: {ROWS}"},
    "--pool": {"metavar": "FILE"},
    "--project": {"metavar": "PROJECT"},
    "--prompts": {"metavar": "FILE", "help": PROMPTS},
    "--results": {"metavar": "FILE"},
    "--rewards": {"metavar": "YAML", "help": REWARDS},
    "--seed": {"type": int, "default": 0, "metavar": "N"},
    "--shard": {"type": share, "default": (1, 1), "metavar": "I/K"},
    "--user": {"metavar": "ID"},
    "--workers": {"type": integer(1), "metavar": "N"},
    "--winner": {
        "nargs": "+",
        "default": [],
        "metavar": "KEY=TEXT",
        "type": assignment("KEY=TEXT"),
        "help": "column that names the preferred response, and its labels: column=comparison left=A right=B tie=same; "
        "several labels: tie=same tie=neither; no column does: column=",
    },
    "--users": {
        "metavar": "PLACE",
        "help": "where the users are: a file or postgresql+psycopg://... (default: <stem>.users.db of the checkpoint)",
    },
}
"""Options for the same thing have the same name in every command; what a command adds is said where it is made."""


class _Keep(argparse.Action):
    """Keeps the value of an option; where it takes several values, those of a repeated one add up."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest)
        adds_up = self.nargs == "+" and before is not self.default
        setattr(namespace, self.dest, [*before, *values] if adds_up else values)


class OptionParser(argparse.ArgumentParser):
    """argparse with one-message errors that name the nearest option."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.register("action", None, _Keep)

    def add_shared(self, name: str, **changes: Any) -> None:
        """Add an option of the table `SHARED`, with what is particular to this command."""
        self.add_argument(name, **{**SHARED[name], **changes})

    def parse(self, args: list[str]) -> argparse.Namespace:
        """Parse all arguments or stop with one message; the output of one of several shares is named after it."""
        if not {"-h", "--help"} & set(args):
            self._check_names(args)
        parsed, unknown = self.parse_known_args(args)
        if unknown:
            before = args[: args.index(unknown[0])]
            if len(before) > 1 and before[-2].startswith("--") and not before[-1].startswith("-"):
                self.error(f"{before[-2]} takes one value, got {before[-1]!r} and {unknown[0]!r}")
            more = "more " if any(not action.option_strings for action in self._actions) else ""
            self.error(f"{self.prog} takes no {more}arguments, got {unknown[0]!r}")
        if getattr(parsed, "output", None) is not None and "shard" in parsed:
            parsed.output = share_name(parsed.output, parsed.shard)
        self._keep_inputs(parsed)
        return parsed

    def _check_names(self, args: list[str]) -> None:
        """Stop at an option that there is not; argparse would first ask for those that are missing."""
        options = [option for action in self._actions for option in action.option_strings]
        for arg in takewhile(lambda arg: arg != "--", args):
            name = arg.partition("=")[0]
            if re.match(r"--?[A-Za-z]", arg) and " " not in name and name not in options:
                self.error(f"no option {name!r}{nearest(name, options)}")

    def _keep_inputs(self, parsed: argparse.Namespace) -> None:
        """Stop where ``--output`` names a file that another option reads."""
        output = getattr(parsed, "output", None)
        if output is None or not os.path.isfile(output):
            return
        for name, value in vars(parsed).items():
            paths = value if isinstance(value, list) else [value]
            same = any(isinstance(path, str) and os.path.realpath(path) == os.path.realpath(output) for path in paths)
            if same and name != "output":
                self.error(f"--output: {output!r} is what --{name} reads; write to another file")

    def error(self, message: str) -> NoReturn:
        """Stop with one message and status 2."""
        stop(f"{message.removeprefix('argument ')} ({self.prog} --help)")


def check_encoder(parser: OptionParser, options: argparse.Namespace) -> None:
    """Refuse options of an encoder behind a server that have no effect without the others."""
    if (options.encoder_url is None) != (options.encoder_model is None):
        parser.error("--encoder_url and --encoder_model go together")
    if options.encoder_unchecked and options.encoder_url is None:
        parser.error("--encoder_unchecked is of --encoder_url")


def check_engine(parser: OptionParser, options: argparse.Namespace) -> None:
    """Refuse ``--workers`` without workers, and Ray where it is not installed."""
    if options.engine == "local" and options.workers is not None:
        parser.error("--workers goes with --engine ray")
    if options.engine == "ray" and find_spec("ray") is None:
        raise ValueError(f"{parser.prog} --engine ray needs ray; pip install 'plm[ray]'")


def add_ray(parser: OptionParser, condition: str) -> None:
    """Add the options of workers that do a share each, under a condition on what they see."""
    parser.add_shared(
        "--engine",
        help=f"ray: workers of Ray do a share each, here or on the cluster that RAY_ADDRESS names, {condition}; it "
        "needs pip install 'plm[ray]' (default local: this process)",
    )
    parser.add_shared("--workers", help="of Ray (default: one for each GPU, or each CPU but one)")


def check_ray(parser: OptionParser, options: argparse.Namespace) -> None:
    """Refuse options of `add_ray` that have no effect beside the others; else `check_engine`."""
    if options.engine == "ray" and options.shard != (1, 1):
        parser.error("--shard and --engine ray are two ways to share the work; give one of them")
    check_engine(parser, options)


READING = ("--layout", "--columns", "--winner", "--attributes")
"""How files of pairs are read."""


def add_reading(parser: OptionParser) -> None:
    """Add the options of how files of pairs are read."""
    for name in READING:
        parser.add_shared(name)


def reading_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `add_reading` added, as arguments of `plm.data.schema.read_pairs`.

    Raises:
        ValueError: If a weight is no number.
    """
    winner: dict[str, Any] = {}
    for key, text in options.winner:
        winner[key] = (text or None) if key == "column" else [*winner.get(key, []), text]
    weights = {}
    for column, text in options.attributes:
        try:
            weights[column] = float(text)
        except ValueError:
            raise ValueError(f"--attributes: expected a number as the weight of {column}, got {text!r}") from None
    return {
        "columns": {name: column or None for name, column in options.columns},
        "winner": winner or None,
        "attributes": weights or None,
        "layout": options.layout,
    }


def read_as_trained(options: argparse.Namespace, on_error: Any = "stop") -> PairTable:
    """Read ``--pairs`` as `add_reading` says, or as those of the training of ``--ckpt_path`` were read.

    Raises:
        ValueError: If they cannot be read.
    """
    from plm.checkpoint import training_reading
    from plm.data.conversion import has_our_columns
    from plm.data.schema import read_pairs

    reading = reading_of(options)
    former = {} if any(reading.values()) else training_reading(options.ckpt_path)
    if former:
        given = ", ".join(f"{name}: {value}" for name, value in former.items())
        print(f"the pairs are read as those of the training were ({given})")
    try:
        return read_pairs(options.pairs, **(former or reading), on_error=on_error)
    except ValueError as error:
        if not former or not has_our_columns(options.pairs[0]):
            raise
        advice = "pairs with the columns user_id, prompt, chosen and rejected are read with --layout pairs"
        raise ValueError(f"{advice}; as those of the training they are not:\n{error}") from error


def check_config_or_pairs(parser: OptionParser, options: argparse.Namespace, overrides: list[str]) -> None:
    """Refuse a recipe beside files of pairs, neither of them, and options of the one with the other."""
    if (options.config is None) == (options.pairs is None):
        parser.error("give either --config or --pairs")
    if options.pairs and overrides:
        parser.error(f"{overrides[0].partition('=')[0]!r} overrides a recipe; it needs --config")
    named = [name for name in READING if getattr(options, name.removeprefix("--"))]
    if named and not options.pairs:
        parser.error(f"{named[0]} goes with --pairs")


def split_overrides(args: list[str]) -> tuple[list[str], list[str]]:
    """Separate a command's own arguments from options of a recipe, which are returned as ``key=value``."""
    plain: list[str] = []
    overrides: list[str] = []
    rest = iter(args)
    for arg in rest:
        if not re.match(r"--(data|model|trainer)\.", arg):
            plain.append(arg)
            continue
        key, equals, value = arg.removeprefix("--").partition("=")
        overrides.append(f"{key}={value if equals else next(rest, '')}")
    return plain, overrides


def add_settings(parser: OptionParser) -> None:
    """Add the options of how texts are drawn."""
    group = parser.add_argument_group("how texts are drawn")
    group.add_argument("--max_new_tokens", type=int, default=64, metavar="N", help="cut a text here (default 64)")
    group.add_argument("--min_new_tokens", type=int, default=0, metavar="N", help="no text ends earlier (default 0)")
    group.add_argument("--temperature", type=float, default=1.0, help="0 = the likeliest token (default 1)")
    group.add_argument("--top_k", type=int, metavar="K", help="draw from the K likeliest tokens (default: all)")
    group.add_argument("--top_p", type=float, metavar="P", help="draw from the likeliest tokens of joint probability P")
    group.add_argument("--seed", **{**SHARED["--seed"], "help": "a prompt gets the same texts again (default 0)"})
    group.add_argument(
        "--batch_tokens",
        type=int,
        metavar="N",
        help="most tokens written at once; changes memory and speed alone (default 16384)",
    )


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `add_settings` added, as arguments of `plm.generation.sample`."""
    names = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "seed")
    settings = {name: getattr(options, name) for name in names}
    if options.batch_tokens is not None:
        settings["batch_tokens"] = options.batch_tokens
    return settings


def add_policy(parser: OptionParser) -> None:
    """Add the options of which model writes."""
    group = parser.add_argument_group("who writes")
    group.add_argument(
        "--policy", metavar="MODEL", help="folder or hub id of a causal LM; with --policy_url its name there"
    )
    group.add_argument(
        "--policy_url",
        metavar="URL",
        help="an OpenAI-compatible server that writes instead, such as http://localhost:8000/v1; its key, if it wants "
        "one, is the environment variable PLM_POLICY_KEY",
    )
    group.add_argument("--concurrency", type=integer(1), metavar="N", help="requests to it at once (default 16)")
    group.add_argument(
        "--template", choices=("plain", "chat"), default="plain", help="chat: its chat template (default plain)"
    )
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default float32)")
    group.add_argument(
        "--max_prompt_length", type=int, metavar="N", help="keep the last N tokens of a prompt (default: all)"
    )


def check_policy(parser: OptionParser, options: argparse.Namespace) -> None:
    """Refuse options of `add_policy` that have no effect beside the others."""
    here = ("dtype", "max_prompt_length", "batch_tokens")
    for name in here if options.policy_url else ("concurrency",):
        if getattr(options, name) is not None:
            where = "of a policy that is loaded here" if options.policy_url else "of requests to --policy_url"
            parser.error(f"--{name} is {where}; leave it out")


def check_best_of(parser: OptionParser, options: argparse.Namespace) -> None:
    """Refuse ``--best_of`` without a policy whose texts it chooses from, one without the other; else `check_policy`."""
    if (options.policy is None and options.policy_url is None) != (options.best_of is None):
        parser.error("--policy and --best_of go together: N texts of a policy are written, here or by --policy_url")
    check_policy(parser, options)
