"""Another program on the server's database: holds its write lock, or an open read, for some time.

    python3 tests/support/stranger.py data/roundhouse.db writes 10

Says `holds` once it does.
"""

from __future__ import annotations

import sqlite3
import sys
import time

HOLDS = {
    "writes": ("BEGIN IMMEDIATE",),
    # A transaction reads from its first look on.
    "reads": ("BEGIN", "PRAGMA user_version"),
}


def hold(database: str, what: str, seconds: float) -> None:
    """Begin, say so, and stay."""
    connection = sqlite3.connect(database, isolation_level=None)
    for statement in HOLDS[what]:
        connection.execute(statement).fetchone()
    print("holds", flush=True)
    time.sleep(seconds)
    connection.close()


if __name__ == "__main__":
    hold(sys.argv[1], sys.argv[2], float(sys.argv[3]))
