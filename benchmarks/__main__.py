"""Run the benchmarks named on the command line, or all: every module here with a `run()` that returns rows."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import benchmarks


def main(names: list[str]) -> None:
    """Raises SystemExit for an unknown name."""
    known = {m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in ("__main__", "peers", "tables")}
    unknown = set(names) - known
    if unknown:
        raise SystemExit(f"unknown benchmark {sorted(unknown)}; there are {sorted(known)}")
    for name in names or sorted(known):
        print(f"\n# {name}", flush=True)
        for row in importlib.import_module(f"benchmarks.{name}").run():
            print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
