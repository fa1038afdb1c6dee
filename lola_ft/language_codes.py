"""Language codes, which have two or three letters and may be followed by a script or a country."""

from functools import cache


@cache
def short_code(code: str) -> str:
    """Return a code without script and country, in two letters if the language has them: `sw` for `swh_Latn`."""
    from babel.core import get_global

    language = code.replace("_", "-").split("-")[0]
    return str(get_global("language_aliases").get(language, language)).split("_")[0]
