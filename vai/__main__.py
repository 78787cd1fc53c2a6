"""`python -m vai` is `vai`."""

from __future__ import annotations

from vai.cli import main

main()
