"""How long the bundled server takes to start in each kind of image. `python benchmarks/images.py N IMAGE.sif…`.

Each image is started N times, all in turn, so that a machine whose speed drifts is as slow for all. Prints the rows of
the table in docs/images.md: median seconds of `start()`, and the ratio to the first image's.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from hpc_workspace import ApptainerWorkspace, clock


def start_s(image: str) -> float:
    """Seconds for `start()`."""
    began_s = clock.now_s()
    with ApptainerWorkspace(image=image):
        return clock.now_s() - began_s


def main(rounds: int, images: list[str]) -> None:
    taken: dict[str, list[float]] = {image: [] for image in images}
    for image in images:
        start_s(image)  # page cache and toolbox are warm for all
    for _ in range(rounds):
        for image in images:
            taken[image].append(start_s(image))
    base = statistics.median(taken[images[0]])
    for image, seconds in taken.items():
        median = statistics.median(seconds)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"| `{Path(image).stem}` | {median:.2f} s ({spread}) | {median / base:.2f} |")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
