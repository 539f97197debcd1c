"""Users as rows of a database: in a file beside the checkpoint, or on a PostgreSQL server."""

from plm.users.database import StoreError, problem_of_id
from plm.users.store import Receipt, UserStore, shared_hash, store_path
from plm.users.stored import StoredUser

__all__ = ["Receipt", "StoreError", "StoredUser", "UserStore", "problem_of_id", "shared_hash", "store_path"]
