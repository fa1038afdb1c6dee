"""Checkpoints on disk: safetensors files, a folder opened and checked, its fingerprint, its tokenizer."""
