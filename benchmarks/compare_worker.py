"""One side of ``python -m benchmarks compare``: times the cases of a file, when it is asked to, with one fastrefine.

Usage: compare_worker.py CASES FOLDER. For each name on a line of stdin one line of JSON: {"seconds": ...}, or {"error": ...}.
"""

import json
import os
import runpy
import sys
import time
import warnings

PREFIX = "bench_"


def main(file: str, folder: str) -> None:
    """Prepare every case, run each once, say their names, then answer."""
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a case prints is no answer
    warnings.simplefilter("ignore")  # of networks with random weights
    import fastrefine

    home = os.path.realpath(os.path.dirname(os.path.dirname(fastrefine.__file__)))
    if home != os.path.realpath(folder):
        told.write(json.dumps({"error": f"fastrefine was imported from {home}, wanted {folder}"}) + "\n")
        return
    found = runpy.run_path(file)
    clock = found.get("clock", time.process_time)  # CPU time: other work on the machine does not lengthen it
    cases = {}
    for name, make in found.items():
        if name.startswith(PREFIX) and callable(make):
            cases[name.removeprefix(PREFIX)] = make()
    for run in cases.values():
        run()
    told.write(json.dumps({"cases": list(cases)}) + "\n")
    for line in sys.stdin:
        began = clock()
        cases[line.strip()]()
        told.write(json.dumps({"seconds": clock() - began}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
