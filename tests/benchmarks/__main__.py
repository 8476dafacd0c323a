"""Runs the benchmarks, all of them or the named ones, each in a process of its own: python tests/benchmarks [NAME ...].

Standard output gets one JSON line a benchmark. The exit code is 1 where one failed or missed what was wanted.
"""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ORDER = (
    "training_in_process",
    "autoencoders",
    "training_two_workers",
    "loader",
    "augmentation",
    "sequences",
    "startup_in_process",
    "startup_ray",
    "reporting",
    "streaming_memory",
    "predicting",
    "gan_quality",
    "adversarial",
    "sweeps",
    "fused",
    "gpu",
    "trees",
    "serving",
)


def run(name: str) -> bool:
    """Whether it came to its end with what was wanted, or had reason to be skipped."""
    process = subprocess.run([sys.executable, HERE / f"{name}.py"], stdout=subprocess.PIPE, text=True, check=False)
    print(process.stdout, end="", flush=True)
    if process.returncode:
        print(f"{name}: failed with exit code {process.returncode}", file=sys.stderr, flush=True)
        return False
    line = json.loads(process.stdout.splitlines()[-1])
    verdict = f"skipped: {line['skipped']}" if "skipped" in line else f"{line['ratio']:.3f}, wanted {line['wanted']}"
    met = line.get("met", True)
    print(f"{name}: {verdict}{'' if met else '  <-- missed'}", file=sys.stderr, flush=True)
    return met


def main() -> None:
    names = sys.argv[1:] or ORDER
    unknown = [name for name in names if name not in ORDER]
    if unknown:
        sys.exit(f"{', '.join(unknown)}: no such benchmark; there are {', '.join(ORDER)}")
    missed = [name for name in names if not run(name)]
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
