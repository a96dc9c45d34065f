"""Texts that come from outside: they must be valid Unicode before tokenizers, JSON and parquet get them."""

from data_tools.core.errors import UsageError


def text_fault(text: str) -> str:
    """Return what is wrong with a text, "" if it is valid: a NUL, or bytes of the command line that are not UTF-8."""
    if "\0" in text:
        return "contains a NUL character"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "is not valid UTF-8"
    return ""


def check_text(text: str, kind: str, where: str | None = None) -> None:
    """Raise UsageError for a text that has a fault; `kind` names it, such as "class name"."""
    fault = text_fault(text)
    if fault:
        raise UsageError(f"the {kind} {text[:60]!a} {fault}", where=where, hint="write it in UTF-8")
