"""``plm adapt``: learn new users of a checkpoint from their pairs."""

from __future__ import annotations

from plm.cli.options import OptionParser


def run(args: list[str]) -> None:
    """Learn the users and add them to the store beside the checkpoint.

    Raises:
        ValueError: If the checkpoint or the pairs cannot be read.
    """
    parser = OptionParser(
        prog="plm adapt",
        description="Learn users of a checkpoint from their pairs. The checkpoint stays as it is: the users go to the "
        "store beside it, <stem>.users/. A user who is already there is learned anew from these pairs alone.",
    )
    parser.add_shared("--ckpt_path", required=True)
    parser.add_shared("--pairs", required=True)
    parser.add_shared("--columns")
    options = parser.parse(args)

    from rich.console import Console
    from rich.table import Table

    from plm.adapting import adapt_users
    from plm.checkpoint import load_method
    from plm.data.schema import read_pairs
    from plm.evaluation import print_parts
    from plm.users import store_path

    method = load_method(options.ckpt_path)
    user_ids, states = adapt_users(method, read_pairs(options.pairs, dict(options.columns)))
    store = method.known_users.store
    num_known = sum(user_id in store for user_id in user_ids)
    store.add(user_ids, states)
    store.save(store_path(options.ckpt_path))
    pairs = states.num_pairs.float()
    summary = Table("users", "new", "learned anew", "pairs per user (median, most)", "in the store")
    summary.add_row(
        str(len(user_ids)),
        str(len(user_ids) - num_known),
        str(num_known),
        f"{pairs.median():.0f}, {pairs.max():.0f}",
        str(len(store)),
    )
    console = Console()
    print_parts(summary, console=console)
    console.print(f"written to {store_path(options.ckpt_path)}", soft_wrap=True, highlight=False)
