"""Folders that need nothing of ours: LOLA's weights with the code that loads them.

`configuration_lola.py` and `modeling_lola.py` are copied beside the weights. They run wherever transformers does (4.41
to 5), so they import nothing of lola_ft; in this package nothing imports them.
"""
