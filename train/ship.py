"""The trained pair becomes part of the package: `vai run` without a name, `make demo` and `vai bench switch` find it.

Run: python -m train.ship MINI.gguf NANO.gguf, with files as `vai quantize` or train.quantize leave them. Then commit
what is in vai/shipped; the wheel and the source archive carry it.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from vai.burn.burn import preview
from vai.burn.gguf import GgufFile
from vai.cli.shipped import FOLDER, NAMES

MAX_BYTES = 16_000_000  # of both together: everybody who installs VAI downloads them


def ship(files: list[Path], folder: Path = FOLDER) -> int:
    """Copy the pair, the larger first, into `folder`; return its bytes. Raises SystemExit where the files are too
    large or have different tokenizers, VaiError where VAI cannot burn them."""
    total = sum(file.stat().st_size for file in files)
    if total > MAX_BYTES:
        raise SystemExit(f"The pair takes {total:,} bytes of at most {MAX_BYTES:,}; choose narrower types.")
    words = []
    for file in files:
        preview(file)
        with GgufFile(file) as gguf:
            words.append({key: value for key, value in gguf.metadata.items() if key.startswith("tokenizer.")})
    if words[0] != words[1]:
        raise SystemExit("The tokenizers differ, so that the small model could not guess for the large one.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in zip(NAMES, files, strict=True):
        shutil.copyfile(file, folder / f"{name}.gguf")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="Put the trained pair into the package.")
    parser.add_argument("mini", type=Path)
    parser.add_argument("nano", type=Path)
    args = parser.parse_args()
    print(f"{ship([args.mini, args.nano]):,} bytes in {FOLDER}")


if __name__ == "__main__":
    main()
