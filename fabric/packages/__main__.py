"""`python -m fedtide.fabric.packages`: finds or makes the environment of an app, in a process that may be ended.

Takes one `Wanted` as a line of JSON, and tells on standard output

    {"wheels": [NAME, ...]}      it needs these wheels: the next line of its input is the folder that has them
    {"python": PATH or null}     the interpreter to use; null: that of the caller
    {"error": KIND, "what": TEXT, "remedy": TEXT}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedtide.fabric.errors import FedtideError
from fedtide.fabric.packages.environment import python_for
from fedtide.fabric.packages.keeping import make_room
from fedtide.fabric.packages.rules import Wanted
from fedtide.fabric.packages.wheels import fitting


def main() -> int:
    wanted = Wanted.model_validate_json(sys.stdin.readline())

    def fetch() -> Path:
        _say(wheels=fitting(list(wanted.wheels)))
        return Path(sys.stdin.readline().rstrip("\n"))

    try:
        python = python_for(wanted, fetch)
        make_room(wanted.root, wanted.rules)
    except FedtideError as exc:
        _say(error=type(exc).__name__, what=exc.what, remedy=exc.remedy)
    else:
        _say(python=str(python) if python is not None else None)
    return 0


def _say(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
