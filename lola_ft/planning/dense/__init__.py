"""Plans of dense baselines: what of a plan `planning/kinds.py` takes from here and not from LOLA's layers."""
