"""The doctor: versions, hardware, what works and what is missing."""

from lola_ft.doctor.check import Check, Status, examine
from lola_ft.doctor.run_checks import doctor

__all__ = ["Check", "Status", "doctor", "examine"]
