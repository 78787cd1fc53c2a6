"""rom starts in milliseconds and cannot break with a wheel: it imports without site-packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_rom_imports_with_the_standard_library_alone() -> None:
    script = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import vai.rom.image, vai.rom.mapping, vai.rom.view, vai.rom.room, vai.rom.holders, vai.rom.segment, vai.rom.registry
print(*sorted({{m.partition('.')[0] for m in sys.modules}} - set(sys.stdlib_module_names) - {{'__main__'}}))
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["vai"]
