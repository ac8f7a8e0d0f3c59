"""Text from tests and guests, made safe for a report: a guest's console may print anything."""

import re
from typing import Final

# Control characters except tab and line feed, and what only looks like a line feed; surrogates cannot be encoded.
_UNPRINTABLE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """Replace every character that no report can carry by its Python escape, such as backslash x1b."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
