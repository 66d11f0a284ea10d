"""Prints the tables in Markdown: `python -m tests.benchmarks [--quick] [PART ...]`."""

import argparse
import platform
import sys
import warnings
from datetime import date
from pathlib import Path

import torch

from . import growth, measures, peers, ranks, steps
from .timing import HEAD, table

PARTS = {"steps": steps, "measures": measures, "growth": growth, "ranks": ranks}


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=" ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="smaller and fewer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    print(
        f"{date.today()}: {processor()}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    for name in peers.missing():
        print(f"\nMissing: {name}")
    for part in map(PARTS.__getitem__, arguments.parts):
        print(f"\n{part.__doc__}\n", flush=True)
        found = []
        for row in part.rows(arguments.quick):
            print(*row.cells(), sep=" | ", file=sys.stderr)
            found.append(row)
        print(table(found, getattr(part, "HEAD", HEAD)), flush=True)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
