"""Does one crash case again: `python -m tests.crash.replay 'CASE'`, as a failing test prints it."""

from __future__ import annotations

import sys

import trio

from tests.crash.explorer import Case, Explorer, Scene, Wrong
from tests.crash.machine import repeatable


async def main(text: str) -> int:
    case = Case.parse(text)
    with repeatable():
        explorer = Explorer(await Scene.make(case.order, case.start), case.seed)
        try:
            await explorer.replay(case)
        except Wrong as wrong:
            sys.stdout.write(f"{wrong}\n")
            return 1
    sys.stdout.write("as it should be\n")
    return 0


if __name__ == "__main__":
    sys.exit(trio.run(main, sys.argv[1]))
