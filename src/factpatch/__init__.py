"""Patch what a language model knows, prove the patch worked, and undo it any time."""
