"""Of vLLM's and SGLang's wheels what `coterie bench kernels --peers DIR` reads: `python bench/slim_wheels.py WHEELS DIR`.

0.4 MB instead of 375, under the same names, for a machine to which little can be brought.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

from coterie.launch.wheel_files import KEPT


def main(wheels: Path, out: Path) -> None:
    """One line a wheel."""
    out.mkdir(parents=True, exist_ok=True)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(out / wheel.name, "w", zipfile.ZIP_DEFLATED) as slim:
            kept = [name for name in whole.namelist() if KEPT.search(name)]
            for name in kept:
                slim.writestr(name, whole.read(name))
        print(f"{out / wheel.name}: {len(kept)} files, {(out / wheel.name).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    main(given.wheels, given.out)
