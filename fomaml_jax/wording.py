"""Names and numbers as people read them, whatever is in a name and of whatever size a number is."""

import math
from collections.abc import Iterable


def plain(text: str) -> str:
    r"""A text for matplotlib: dollars are no mathematics, and what is no letter can be seen.

    Of what begins with an underscore it would leave out the label.

    Example:
        >>> print(plain("cost in $"), plain("caf\udce9"), plain("_run"))
        cost in \$ caf\udce9  _run
    """
    text = f" {text}" if text.startswith("_") else text
    return text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def counted(count: int, thing: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "row"), counted(2, "row")
        ('1 row', '2 rows')
    """
    return f"{count} {thing}{'s' * (count != 1)}"


FEW = 15
"""With fewer tasks the normal distribution's interval is too narrow by a tenth and more."""


def caveat(num_tasks: float) -> str:
    """What is to be said behind an interval over so few tasks; nothing over enough.

    Example:
        >>> caveat(4), caveat(100)
        (', too narrow for so few as 4, of which little can be said', '')
    """
    few = f", too narrow for so few as {num_tasks}, of which little can be said"
    return few if num_tasks < FEW else ""


def decimals(sizes: Iterable[float]) -> int:
    """Three, or as many as show three digits of the largest, which may be of any unit.

    Example:
        >>> decimals([12.0]), decimals([0.000194])
        (3, 6)
    """
    largest = max(sizes, default=0.0)
    if largest == 0 or not math.isfinite(largest):
        return 3
    return max(3, 2 - math.floor(math.log10(largest)))
