"""The nano base: a tiny LOLA (or another family), and the text that it is pre-trained on.

The text is the Universal Declaration of Human Rights in 197 languages and scripts, and names from Unicode CLDR in 144
languages.
"""

from lola_ft.nano.build import build_nano
from lola_ft.nano.settings import NanoSettings

__all__ = ["NanoSettings", "build_nano"]
