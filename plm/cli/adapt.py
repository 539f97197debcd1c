"""``plm adapt``: learn new users of a checkpoint from their pairs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plm.cli.options import OptionParser, add_ray, add_reading, check_ray, read_as_trained
from plm.cli.shares import run_by_ray

if TYPE_CHECKING:
    from plm.data.collate import FeaturedPairs
    from plm.metrics import FewShotTable


def run(args: list[str]) -> int:
    """Learn the users and add them to the store beside the checkpoint.

    Raises:
        ValueError: If the checkpoint or the pairs cannot be read.
    """
    parser = OptionParser(
        prog="plm adapt",
        description="Learn users of a checkpoint from their pairs. The checkpoint stays as it is: the users go to the\n"
        "store beside it as they are learned. A user who is already there and whose pairs are kept is learned from\n"
        "these and the new ones; one whose pairs were not kept, as those of the training are not, is learned anew\n"
        "from the new pairs alone. Files are read with the columns of the training's, unless options say how.\n"
        "Where the run has tested unseen users and eight of the users are new, it says whether they are predicted as\n"
        "well as those were, or whether the checkpoint should be fitted again.\n"
        "Processes that share the work get --shard 1/4 to --shard 4/4, in any order, at once or not: each adds users\n"
        "of its own to the same store.",
    )
    parser.add_shared("--ckpt_path", required=True)
    parser.add_shared("--pairs", required=True)
    add_reading(parser)
    parser.add_shared("--on_error")
    parser.add_shared("--users")
    parser.add_argument(
        "--keep_pairs",
        action="store_true",
        help="keep the pairs of these users beside their states, so that later pairs add to them; those of users whose "
        "pairs are kept already stay kept without it (default: the states alone)",
    )
    parser.add_shared("--shard", help="the I-th of K equal shares of the users, by hashes of their ids (default: all)")
    add_ray(parser, "where all see the checkpoint, the pairs and the store, which several machines share as PostgreSQL")
    options = parser.parse(args)
    check_ray(parser, options)
    if options.engine == "ray":
        return run_by_ray("adapt", args, options)

    import numpy as np
    from rich.table import Table

    from plm.adapting import learn_users, predicted_new_users, users_of_share
    from plm.checkpoint import load_method
    from plm.data.skipped import unused, write_skipped
    from plm.evaluation import MIN_USERS, drift_report, print_parts, unseen_users_curve

    method = load_method(options.ckpt_path, users=options.users)
    table = read_as_trained(options, options.on_error)
    index, count = options.shard
    skipped = unused(_beside(options, "skipped.ndjson"))
    if index == 1 and write_skipped(table, skipped):  # beside the users, with whom it is erased; once, of all shares
        print(f"malformed rows are in {skipped}")
    table = users_of_share(table, options.shard)
    if not table.num_pairs:
        print(f"no user of the file is in shard {index}/{count}")
        return 0
    _beside(options, "drift.json").unlink(missing_ok=True)  # of other users, or of these when they were new
    judges = method.view == "features" and count == 1  # a share knows a part of the users
    curve = unseen_users_curve(options.ckpt_path) if judges else None
    predicted: list[FewShotTable | None] = []

    def predict(data: FeaturedPairs) -> None:
        """Predict pairs of new users before they are learned."""
        if curve is not None:
            predicted.append(predicted_new_users(method, data, curve["shots"], curve["group_by"]))

    learned = list(learn_users(method, table, options.keep_pairs, predict))
    num_known, num_added = (sum(part.num_known for part in learned), sum(part.num_added for part in learned))
    num_gone = sum(part.num_gone for part in learned)
    pairs = np.concatenate([part.num_pairs for part in learned])
    summary = Table("users", "new", "pairs added", "learned anew", "pairs per user (median, most)", "in the store")
    summary.add_row(
        str(len(pairs)),
        str(len(pairs) - num_known),
        str(num_added),
        str(num_known - num_added),
        f"{np.median(pairs):.0f}, {pairs.max()}" if len(pairs) else "–",
        str(len(method.users)),
    )
    print_parts(summary)
    if num_gone:
        print(f"{num_gone} more were deleted meanwhile and are left out")
    print(f"written to {method.users.place}")
    for new_users in predicted:
        if curve is not None and new_users is not None and len(new_users.user_row) >= MIN_USERS:
            _report(drift_report(new_users, curve), _beside(options, "drift.json"))
    return 0


def _beside(options: Namespace, ending: str) -> Path:
    """A file beside the checkpoint, named after the first file of pairs."""
    return Path(options.ckpt_path).with_name(f"{Path(options.pairs[0]).stem}.{ending}")


def _report(report: dict[str, Any], path: Path) -> None:
    """Show whether the bases fit the new users, and keep the numbers."""
    from plm.atomic import write_json
    from plm.evaluation import drift_table, print_parts

    try:
        write_json(path, report)
        place = f"these numbers are in {path}"
    except OSError as error:  # the checkpoint may lie where nobody writes
        place = f"these numbers are in no file: {error}"
    print_parts("", drift_table(report), report["verdict"], place)
