"""The demo: the nano base learns to name the language of a sentence, with tables and a picture of how well."""
