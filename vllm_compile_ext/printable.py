"""Text of others in our lines: a model's files, a bundle's author or an exception chose it."""

from __future__ import annotations


def plain(text: str) -> str:
    r"""`text` with all that a terminal or a log would act on written out: \x1b, \n, \u202e (bidirectional), ..."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
