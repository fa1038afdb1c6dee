"""The trainers: `sft.py` (text and answers) and `preference.py` (DPO and KTO), on one base in `run_trainer.py`.

`build.py` makes the one that a recipe asks for and puts its callbacks on.
"""
