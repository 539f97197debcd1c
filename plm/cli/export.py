"""``plm export``: what a method has learned of one user, or of all, as models for other software."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from plm.cli.options import SHARED, OptionParser
from plm.hub import check_upload, upload

_SCORES = "score with plm score, or plm generate --policy MODEL --best_of N"


def run(args: list[str]) -> None:
    """Write the model of a user, or the adapters of all users, into a folder.

    Raises:
        ValueError: If the folder holds something, the user is unknown or the method has nothing to export.
    """
    parser = OptionParser(
        prog="plm export",
        description="The model of one user as a folder that works without plm. Methods that are linear in features\n"
        "(LoRe, BradleyTerry, PReF, MRM, FastWeights) and PAL write a Hugging Face sequence-classification model\n"
        "whose logit is the user's reward; its README.md says how to load it. LoRADPO writes the user's adapter as a\n"
        "PEFT folder for PeftModel.from_pretrained, PolicyPortfolio that of the member that serves the user (but for\n"
        "decoding logits, which is no single adapter), SFT a Hugging Face model. With --all one folder of an adapter\n"
        "for every user; README.md says how vLLM and SGLang serve them.",
    )
    parser.add_shared("--ckpt_path", required=True)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--user", **SHARED["--user"], help="whose model; default: the population's")
    choice.add_argument("--all", action="store_true", help="the adapters of all users; the network is loaded once")
    parser.add_shared("--users")
    parser.add_shared("--output", required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights of adapters (default float32)",
    )
    parser.add_argument(
        "--push_to_hub",
        metavar="NAME/REPOSITORY",
        help="also upload the folder to a repository of the Hugging Face hub, which is made where there is none, for "
        "nobody else to see: a model of a person tells of the person",
    )
    options = parser.parse(args)
    folder = Path(options.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output: expected a new or an empty folder, got {str(folder)!r}; choose another name")

    if options.push_to_hub is not None:
        check_upload(options.push_to_hub)
    _write(options, folder)
    if options.push_to_hub is not None:
        print(f"uploaded to {upload(folder, options.push_to_hub)}")


def _write(options: Namespace, folder: Path) -> None:
    """Write the folder."""
    import torch

    from plm.checkpoint import load_method
    from plm.cli.writing import progress_bar
    from plm.exporting import export_user, export_users
    from plm.method.abilities import Exporter, Writer

    method = load_method(options.ckpt_path, users=options.users)
    if not isinstance(method, Exporter):
        instead = "write with plm generate" if isinstance(method, Writer) and method.can_write else _SCORES
        raise ValueError(
            f"{type(method).__name__} has nothing to export: its class has no `export(folder, user)`; {instead}"
        )
    dtype = getattr(torch, options.dtype)
    if options.all:
        with progress_bar("exporting", len(method.known_users.store)) as on_progress:
            count = export_users(method, folder, dtype, on_progress)
        print(f"{count} adapters written to {folder}")
        return
    user, known = method.known_users.lookup([options.user])
    if options.user is not None and not known.all():
        raise ValueError(
            f"no user {options.user!r} beside {options.ckpt_path!r}; run plm adapt first, or leave --user out for the "
            "population"
        )
    export_user(method, folder, user, dtype)
    print(f"written to {folder}")
