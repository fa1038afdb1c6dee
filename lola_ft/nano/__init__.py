"""The nano base: LOLA's architecture at nano size, pre-trained on names from Unicode CLDR in about 150 languages."""

from lola_ft.nano.build import NanoSettings, build_nano

__all__ = ["NanoSettings", "build_nano"]
