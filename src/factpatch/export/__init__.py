"""The way out into other tools: a checkpoint, a PEFT adapter, a GGUF file, each with a card, each verified."""

from factpatch.export.adapter import Shortened, export_adapter, to_adapter
from factpatch.export.card import card
from factpatch.export.checkpoint import export_checkpoint
from factpatch.export.gguf import card_path, export_gguf
from factpatch.export.using import folder_of, how_to_load, hub_id
from factpatch.export.verify import Verified, verify_adapter, verify_checkpoint, verify_gguf

__all__ = [
    "Shortened",
    "Verified",
    "card",
    "card_path",
    "export_adapter",
    "export_checkpoint",
    "export_gguf",
    "folder_of",
    "how_to_load",
    "hub_id",
    "to_adapter",
    "verify_adapter",
    "verify_checkpoint",
    "verify_gguf",
]
