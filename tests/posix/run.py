"""`python -m tests.posix.run DIR [SCENARIO ...]`: do the scenarios in DIR and print what came of them."""

from __future__ import annotations

import errno
import os
import sys

from tests.posix import on_callers, on_effects, on_files, on_names, on_rights, on_times, on_trees
from tests.posix.probe import SCENARIOS, Probe, remove

MODULES = (on_callers, on_effects, on_files, on_names, on_rights, on_times, on_trees)


def main(words: list[str]) -> None:
    """Each scenario gets a directory of its own that anybody may enter and write to."""
    os.umask(0)
    os.chdir(words[0])
    for name in words[1:] or list(SCENARIOS):
        os.mkdir(name)
        os.chmod(name, 0o777)
        os.chdir(name)
        probe = Probe(name)
        try:
            SCENARIOS[name](probe)
        except OSError as error:
            if os.geteuid() == 0:
                raise
            # It goes on with what only root may do.
            probe.note("ended by", errno.errorcode.get(error.errno or 0, str(error)))
        os.chdir("..")
        remove(name)
        sys.stdout.buffer.write("".join(f"{line!r}\n" for line in probe.lines).encode())
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
