"""The nano base: LOLA's architecture at nano size, pre-trained on names from Unicode CLDR in 144 languages."""

from lola_ft.nano.build import NanoSettings, build_nano

__all__ = ["NanoSettings", "build_nano"]
