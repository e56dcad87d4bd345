#!/usr/bin/env python3
"""Are Python's headers here, of the interpreter that runs this? Without them no module can be built for it.

Says nothing and succeeds if they are; else tells in one sentence what to install, and fails.
"""

import os
import sys
import sysconfig


def what_is_missing() -> str:
    """The sentence; empty if nothing is."""
    folder = sysconfig.get_path("include")
    if os.path.exists(os.path.join(folder, "Python.h")):
        return ""
    return f"Python's headers are not in {folder}; install them (Debian: python3-dev)"


if __name__ == "__main__":
    sys.exit(what_is_missing() or None)
