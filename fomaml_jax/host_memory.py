"""How much memory this process may come to use."""

import contextlib
import math
import os
from pathlib import Path


def most() -> float:
    """In bytes; infinite where the system does not tell.

    Example:
        >>> most() > 1e6
        True
    """
    known = [math.inf]
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows does not tell
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):  # in a container; "max" is no number
        known.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(known)
