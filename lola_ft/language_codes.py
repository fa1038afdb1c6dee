"""Codes of languages, which come in two letters, in three, and with a script or a country behind them."""

from functools import cache


@cache
def short_code(code: str) -> str:
    """A code without script and country, in two letters where the language has them: `sw` of `swh_Latn`."""
    from babel.core import get_global

    language = code.replace("_", "-").split("-")[0]
    return str(get_global("language_aliases").get(language, language)).split("_")[0]
