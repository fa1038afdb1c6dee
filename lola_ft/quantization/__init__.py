"""4-bit weights: the NF4 store, its layers, and the loader that fills them."""

from lola_ft.families.parts import Audit
from lola_ft.quantization.audit import audit
from lola_ft.quantization.experts import NF4Experts
from lola_ft.quantization.linear import NF4Linear
from lola_ft.quantization.load import load_base, quantize_base

__all__ = ["Audit", "NF4Experts", "NF4Linear", "audit", "load_base", "quantize_base"]
