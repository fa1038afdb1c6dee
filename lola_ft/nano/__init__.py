"""The nano base: LOLA, or another family, at nano size, pre-trained on names from Unicode CLDR in 144 languages."""

from lola_ft.nano.build import build_nano
from lola_ft.nano.settings import NanoSettings

__all__ = ["NanoSettings", "build_nano"]
