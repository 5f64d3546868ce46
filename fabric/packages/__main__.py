"""`python -m fedtide.fabric.packages`: finds or makes the environment of an app, in a process that may be ended.

Takes one `Wanted` as a line of JSON, and tells on standard output

    {"wheels": [NAME, ...]}      it needs these wheels: the next line of its input is the folder that has them
    {"python": PATH or null}     the interpreter to use; null: that of the caller. It is held until the input ends
    {"error": KIND, "what": TEXT, "remedy": TEXT}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedtide.fabric.errors import FedtideError
from fedtide.fabric.packages.environment import environment_for
from fedtide.fabric.packages.keeping import make_room
from fedtide.fabric.packages.rules import Wanted
from fedtide.fabric.packages.wheels import fitting


def main() -> int:
    wanted = Wanted.model_validate_json(sys.stdin.readline())

    def fetch() -> Path:
        _say(wheels=fitting(list(wanted.wheels)))
        return Path(sys.stdin.readline().rstrip("\n"))

    try:
        found = environment_for(wanted, fetch)
        if found is not None:
            make_room(wanted.root, wanted.rules)
    except FedtideError as exc:
        _say(error=type(exc).__name__, what=exc.what, remedy=exc.remedy)
    except OSError as exc:
        _say(error="TransientError", what=f"the app's packages cannot be written: {exc}", remedy="See the disk")
    else:
        _say(python=str(found.python) if found is not None else None)
        sys.stdin.read()  # the caller holds it now
    return 0


def _say(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
