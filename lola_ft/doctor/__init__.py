"""The doctor: versions, hardware, and checks of what fine-tuning needs."""

from lola_ft.doctor.check import Check, Status, examine
from lola_ft.doctor.run_checks import doctor

__all__ = ["Check", "Status", "doctor", "examine"]
