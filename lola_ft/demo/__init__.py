"""The demo: the nano base learns to name the language of a sentence; tables and a picture show the accuracy."""
