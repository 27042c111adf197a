"""A plain Python program that shares a counter with every other one running it.

python client.py [ADDRESS]
"""

import sys

from zeolith.client import connection


def main(address: str = "127.0.0.1:8100") -> None:
    opened = connection(address, client_label="counter")
    # Two programs that count at the same moment conflict: the later one tries again.
    for attempt in opened.transaction_manager.attempts(10):
        with attempt:
            root = opened.root()
            root["count"] = root.get("count", 0) + 1
            count = root["count"]
    print(count)
    opened.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
