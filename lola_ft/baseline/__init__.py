"""Dense models that train and are measured exactly as LOLA is, to compare with: GPT-2's and BLOOM's kind.

`either.py` has the functions that a run, a merge and an evaluation call, whichever kind the base is of.
"""
