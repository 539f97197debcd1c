"""``plm users``: list, export or delete the users of a checkpoint."""

from __future__ import annotations

import sys

from plm.cli.options import OptionParser
from plm.messages import nearest

_ACTIONS = ("list", "export", "delete")


def run(args: list[str]) -> None:
    """List, export or delete users.

    Raises:
        ValueError: If no users are stored beside the checkpoint, or one is unknown.
    """
    parser = OptionParser(
        prog="plm users",
        description="list: id and number of pairs of every user, tab separated\n"
        "export: rows of some or all users as JSONL\n"
        "delete: remove users; from then on they are scored like unknown ones",
    )
    parser.add_argument("action", metavar="list|export|delete")
    parser.add_shared("--ckpt_path", required=True, help="checkpoint the users belong to")
    parser.add_shared("--user", nargs="+", help="ids; default for export: all users")
    parser.add_shared("--output", help="JSONL file to export to")
    options = parser.parse(args)
    if options.action not in _ACTIONS:
        parser.error(f"no action {options.action!r}{nearest(options.action, _ACTIONS)}")
    if options.action == "export" and not options.output:
        parser.error("export needs --output FILE")
    if options.action == "delete" and not options.user:
        parser.error("delete needs --user ID")

    from plm.checkpoint import read_checkpoint
    from plm.method import CHECKPOINT_KEY
    from plm.users import UserStore, store_path

    path = store_path(options.ckpt_path)
    if not path.exists():
        raise ValueError(f"no users are stored beside {options.ckpt_path!r}: expected the folder {str(path)!r}")
    store = UserStore.load(path)
    if options.action == "list":
        num_pairs = store.get(store.ids)[0].num_pairs.tolist()
        sys.stdout.writelines(f"{user_id}\t{count}\n" for user_id, count in zip(store.ids, num_pairs, strict=True))
    elif options.action == "export":
        store.export(options.user or store.ids, options.output)
    else:
        store.delete(options.user)
        store.save(path)
        print(f"deleted {len(set(options.user))} users, {len(store)} are left in {path}", file=sys.stderr)
        trained = set(options.user) & set(read_checkpoint(options.ckpt_path)[CHECKPOINT_KEY]["user_ids"])
        if trained:
            print(
                f"{len(trained)} of them were trained on: the checkpoint still holds what training learned of "
                "them, until the method is fitted again without their pairs",
                file=sys.stderr,
            )
