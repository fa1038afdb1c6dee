"""`python -m lola_ft VERB` is `lola-ft VERB`."""

from lola_ft.cli import main

main()
