"""The trainers: `sft.py` (texts and answers) and `preference.py` (DPO and KTO), with a common base `run_trainer.py`.

`build.py` makes a recipe's trainer and adds its callbacks.
"""
