"""Print the peak memory of one peer as JSON; run in a process of its own: `python -m peers.memory TASK PEER`."""

import argparse
import json

from peers.tasks import memory_of

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("peer")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(memory_of(arguments.task, arguments.peer, arguments.quick)))
