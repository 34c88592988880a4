"""A model behind an OpenAI-compatible endpoint: it can be asked and given context, and nothing else."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib import import_module
from typing import Any

from factpatch.errors import MissingExtra, RemoteError, WrongBase
from factpatch.lm.base import Attachable, BaseLM
from factpatch.lm.sentences import first_sentence

__all__ = ["PREFIX", "RemoteLM", "connect"]

PREFIX = "openai:"
"""What the name of a model behind an endpoint begins with on a command line."""

_TIMEOUT = 120.0
_RETRIES = 2
_CONNECTIONS = 4


class RemoteLM(BaseLM):
    """A model that answers over HTTP. Patches that work through the prompt can be laid on it; it has no weights in hand.

    model     the name that the server knows it by
    base_url  where the server is, such as http://localhost:8000/v1; None for OpenAI's own
    """

    def __init__(self, model: str, base_url: str | None, client: Any) -> None:
        super().__init__(PREFIX + model)
        self.model, self.base_url = model, base_url
        self._client = client

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the model's name: the weights cannot be seen, and one model may be served at several places."""
        return hashlib.sha256(self.name.encode()).hexdigest()

    def apply(self, patch: Attachable) -> None:
        """Lay a patch on top. Raises WrongBase if it changes what is inside a model, or was made for another one."""
        if getattr(patch, "needs_weights", True):
            raise WrongBase(
                f"the patch changes what is inside a model; {self.name} can only be asked.\n"
                "  Load the model it was made for, or make one that works through the prompt: factpatch methods"
            )
        super().apply(patch)

    def answer(self, prompts: Sequence[str], *, chat: bool = False, max_new: int = 64) -> list[str]:
        """Greedy answers, cut where a line or a sentence ends; a few prompts are asked at once.

        Plain prompts go to the server's completions, with `chat` to its chat completions.

        Raises RemoteError if the server cannot be reached, refuses, or sends what is no answer.
        """
        before = self.before(prompts)
        texts = list(dict.fromkeys(before[prompt] + prompt for prompt in prompts))
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            replies = list(pool.map(lambda text: self._reply(text, chat=chat, max_new=max_new), texts))
        said = dict(zip(texts, replies, strict=True))
        return [first_sentence(said[before[prompt] + prompt]) for prompt in prompts]

    def describe(self) -> dict[str, Any]:
        """Its name and where it is."""
        return {"name": self.name, "fingerprint": self.fingerprint, "base_url": str(self._client.base_url)}

    def _reply(self, text: str, *, chat: bool, max_new: int) -> str:
        common = {"model": self.model, "max_tokens": max_new, "temperature": 0.0}
        if chat:
            ask = self._client.chat.completions.create
            reply = self._sent(lambda: ask(messages=[{"role": "user", "content": text}], **common), chat=True)
        else:
            reply = self._sent(lambda: self._client.completions.create(prompt=text, **common), chat=False)
        try:
            said = reply.choices[0].message.content if chat else reply.choices[0].text
        except (AttributeError, IndexError, TypeError):
            said = None
        if not isinstance(said, str):
            raise RemoteError(
                f"{self._where()}: the reply holds no answer: {str(reply)[:120]}\n"
                "  Is this an OpenAI-compatible server? Its base URL usually ends in /v1."
            )
        return said

    def _sent(self, send: Callable[[], Any], *, chat: bool) -> Any:
        openai = _library()
        try:
            return send()
        except openai.APITimeoutError:
            raise RemoteError(
                f"{self._where()}: no answer within {_TIMEOUT:.0f} s.\n  Try again, or see to the server's load."
            ) from None
        except openai.APIConnectionError:
            raise RemoteError(
                f"{self._where()}: cannot be reached.\n  Start the server, or give its address: --base-url http://HOST:PORT/v1"
            ) from None
        except (openai.AuthenticationError, openai.PermissionDeniedError):
            raise RemoteError(
                f"{self._where()}: the key was refused.\n  Set the environment variable OPENAI_API_KEY."
            ) from None
        except openai.NotFoundError as error:
            other = "  If the server has no such endpoint: plain prompts need completions" + (
                "." if chat else "; ask through the chat template instead: --chat"
            )
            raise RemoteError(
                f'{self._where()}: not found ({_reason(error)}).\n  Check the model\'s name, "{self.model}".\n{other}'
            ) from None
        except openai.OpenAIError as error:
            raise RemoteError(f"{self._where()}: {_reason(error)}\n  See the server's own messages.") from None
        except ValueError as error:  # JSON that is none
            raise RemoteError(
                f"{self._where()}: the reply cannot be read ({error}).\n  Is this an OpenAI-compatible server?"
            ) from None

    def _where(self) -> str:
        return f"{self.name} at {self._client.base_url}"


def connect(model: str, base_url: str | None = None) -> RemoteLM:
    """A model behind an OpenAI-compatible endpoint, under the name that the server knows it by.

    The key is taken from the environment variable OPENAI_API_KEY; most servers of one's own need none.

    Raises MissingExtra if the client library is not installed, RemoteError for OpenAI's own endpoint without a key.
    """
    openai = _library()
    key = os.environ.get("OPENAI_API_KEY")
    if not key and base_url is None:
        raise RemoteError(
            f"{PREFIX}{model}: no address and no key were given.\n"
            "  Give --base-url http://HOST:PORT/v1, or set the environment variable OPENAI_API_KEY for OpenAI's own."
        )
    client = openai.OpenAI(api_key=key or "none", base_url=base_url, timeout=_TIMEOUT, max_retries=_RETRIES)
    return RemoteLM(model.removeprefix(PREFIX), base_url, client)


def _reason(error: Any) -> str:
    body = getattr(error, "body", None)
    detail = body.get("detail") if isinstance(body, dict) else None  # where FastAPI's servers put it
    return str(detail or getattr(error, "message", error)).splitlines()[0][:160]


def _library() -> Any:
    try:
        return import_module("openai")
    except ImportError:
        raise MissingExtra(
            'a model behind an endpoint needs an extra that is not installed.\n  Install it: pip install "factpatch[remote]"'
        ) from None
