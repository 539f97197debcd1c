"""Users as rows of a database: in a file beside the checkpoint, or on a PostgreSQL server."""

from plm.users.store import Receipt, StoredUser, UserStore, shared_hash, store_path

__all__ = ["Receipt", "StoredUser", "UserStore", "shared_hash", "store_path"]
