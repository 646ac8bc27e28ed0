"""Runs measuring commands one after the other, each with its server awake and all others held. A program of its own,
so that words of the caller (`scripts/bench --turn`) can stand in front of a whole group of measurements.
Argument: JSON file with a list of {"group": process group of the server or null, "command": [words]}."""

import json
import os
import signal
import subprocess
import sys

for one in json.load(open(sys.argv[1])):
    group = one["group"]
    if group:
        os.killpg(group, signal.SIGCONT)
    try:
        subprocess.run(one["command"], check=True)
    finally:
        if group:
            os.killpg(group, signal.SIGSTOP)
