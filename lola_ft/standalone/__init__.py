"""Folders that load without lola_ft: LOLA's weights together with the code that loads them.

`configuration_lola.py` and `modeling_lola.py` are copied into the folder of the weights. They run with transformers
4.41 to 5, so they import nothing of lola_ft. No module of this package imports them.
"""
