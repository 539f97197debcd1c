"""``plm users``: list, export or delete the users of a checkpoint."""

from __future__ import annotations

import sys

from plm.cli.options import OptionParser
from plm.messages import counted, nearest

_ACTIONS = ("list", "export", "delete")
_LATER = "SQLite removes them when no process reads a former state, by the same command; PostgreSQL by VACUUM FULL"
_SHORT = (
    "of binary files only checkpoints, databases and Parquet were read, not pictures and others, for ids too short to "
    "tell from other bytes"
)
_ELSEWHERE = (
    "not looked at: the data that the pairs came from, other runs, copies, backups, and what was sent to a logger. "
    "The shared weights were fitted on the pairs of everybody: fit again without them if they must not count"
)


def run(args: list[str]) -> None:
    """List, export or delete users.

    Raises:
        ValueError: If no users are stored, or one to export is unknown.
    """
    parser = OptionParser(
        prog="plm users",
        description="list: id and number of pairs of every user, tab separated\n"
        "export: rows of some or all users as JSONL\n"
        "delete: remove users from the store, the checkpoints and the files of the run and its tests; from then on\n"
        "they are scored like unknown ones. One receipt a user, as JSONL; may be repeated",
    )
    parser.add_argument("action", metavar="list|export|delete")
    parser.add_shared("--ckpt_path", required=True, help="checkpoint the users belong to")
    parser.add_shared("--user", nargs="+", help="ids; default for export: all users")
    parser.add_shared("--users")
    parser.add_shared("--output", help="JSONL file to export to")
    options = parser.parse(args)
    if options.action not in _ACTIONS:
        parser.error(f"no action {options.action!r}{nearest(options.action, _ACTIONS)}")
    if options.action == "export" and not options.output:
        parser.error("export needs --output FILE")
    if options.action == "delete" and not options.user:
        parser.error("delete needs --user ID")

    from plm.cli.writing import write_rows
    from plm.erasure import erase_users
    from plm.users import UserStore, store_path

    store = UserStore(store_path(options.ckpt_path) if options.users is None else options.users)
    if options.action != "delete" and not store.exists:
        raise ValueError(f"no users are stored beside {options.ckpt_path!r}: expected them in {store.place!r}")
    if options.action == "list":
        sys.stdout.writelines(f"{user.user_id}\t{user.num_pairs}\n" for user in store)
    elif options.action == "export":
        store.export(options.output, options.user)
        print(f"written to {options.output}", file=sys.stderr)
    else:
        erasure = erase_users(options.ckpt_path, options.user, options.users)
        write_rows([receipt._asdict() for receipt in erasure.receipts], None)
        for user_id, receipt in zip(dict.fromkeys(options.user), erasure.receipts, strict=True):
            if not receipt.was_stored:
                print(f"nobody was stored as {user_id!r}", file=sys.stderr)
        num_stored = sum(receipt.was_stored for receipt in erasure.receipts)
        print(f"deleted {counted(num_stored, 'user')}, {len(store):,} left in {store.place}", file=sys.stderr)
        for file in erasure.changed:
            print(f"removed from {file}", file=sys.stderr)
        for file in erasure.remaining:
            print(f"still named in {file}: remove it, or what it says of them, by hand", file=sys.stderr)
        if erasure.short:
            print(f"{_SHORT}: {', '.join(map(repr, erasure.short))}", file=sys.stderr)
        if not all(receipt.is_wiped for receipt in erasure.receipts):
            print(f"{store.place} still holds their bytes: {_LATER}", file=sys.stderr)
        print(_ELSEWHERE, file=sys.stderr)
