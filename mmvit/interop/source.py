"""The name of a model of another library, as `mmvit import` takes it."""

from pathlib import Path

from data_tools.core.errors import UsageError, did_you_mean

LIBRARIES = ("hf", "open_clip", "timm")
_FORMS = "use hf:NAME, timm:NAME or open_clip:ARCH/TAG; for a local model hf:FOLDER, timm:FOLDER or open_clip:FOLDER"


def split_source(source: str) -> tuple[str, str]:
    """Return the library and the name in it; raise UsageError if the library is missing or unknown."""
    library, _, name = source.partition(":")
    if library in LIBRARIES and name:
        return library, name
    hint = did_you_mean(library, LIBRARIES) if name else ""
    if not name and not Path(source).exists() and source.count("/") < 2:
        other = f"open_clip:{source}/TAG or timm:{source}"
        hint = f"did you mean {f'hf:{source}' if '/' in source else other}?"
    raise UsageError(f"{source!r} does not start with the library of the model", where="SOURCE", hint=hint or _FORMS)
