"""Run every benchmark, one after the other, each in a process of its own, and print one table at the end.

All figures are ratios of two things measured in the same run, so that they hold on another machine; a line that
misses its bar begins with MISS, and the exit code is 1 then; one that could not be measured here begins with none, and says
why. --quick takes smaller data, fewer rounds and no Spark: minutes instead of hours. Two proofs by numbers run apart, since they take long: `fuzz_api.py` (100,000 broken
payloads) and `score_fleets.py` (1,000 simulated fleets).

    python benchmarks/run.py [--quick] [NAME ...]        # NAME: refresh, rebuild, ingest, ...
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
# What --quick means to those that count in their own terms.
QUICK = {"intake": ["--rows", "30000", "--rounds", "2"], "latency": ["--trials", "4"], "gate": []}


def run(script: Path, quick: bool) -> tuple[bool, list[str]]:
    """Run one benchmark, show what it prints; return whether it met its bars and its lines for the table."""
    name = script.stem.removeprefix("bench_")
    options = QUICK.get(name, ["--quick"]) if quick else []
    print(f"== {name}", flush=True)
    begun = time.monotonic()
    printed: list[str] = []
    with subprocess.Popen([sys.executable, str(script), *options], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            printed.append(line.rstrip())
    print(f"   {time.monotonic() - begun:.0f} s", flush=True)
    met = process.returncode == 0
    lines = [line for line in printed if line.startswith(("ok  ", "MISS", "none"))]
    if not any(line.startswith(("ok  ", "MISS")) for line in lines):
        said = [line for line in printed if "bar " in line] or printed[-1:] or ["it printed nothing"]
        lines += [f"{'ok  ' if met else 'MISS'} {name}: {' '.join(line.split())}" for line in said]
    return met, lines


def main() -> int:
    """Run the chosen benchmarks; return 1 if one missed a bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    scripts = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}
    unknown = sorted(set(options.names) - scripts.keys())
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(scripts)}")
    results = [run(path, options.quick) for name, path in scripts.items() if not options.names or name in options.names]
    print("\nRatios, each of two things measured in this run:")
    for _, lines in results:
        print(*lines, sep="\n")
    return 0 if all(met for met, _ in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
