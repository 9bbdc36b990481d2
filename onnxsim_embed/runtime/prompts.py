"""Prompts: strings that a model expects before a text, by the text's purpose."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from onnxsim_embed.runtime.options import ResultArguments

DOCUMENT_PROMPTS = ("document", "passage", "corpus")


class Prompted:
    """Methods of an embedder, synchronous or not, that follow from its prompts and `encode`."""

    prompts: dict[str, str]
    default_prompt_name: str | None
    encode: Any

    def prompt_text(self, prompt_name: str | None = None, prompt: str | None = None) -> str:
        """Return the string that `encode` prepends to each text.

        :raises ValueError: if the model has no prompt of that name, listing its prompts.
        """
        if prompt is not None:
            return prompt
        name = prompt_name if prompt_name is not None else self.default_prompt_name
        if name is None:
            return ""
        if name not in self.prompts:
            known = sorted(self.prompts) or "none"
            raise ValueError(f"prompt_name {name!r} is not among the model's prompts: {known}")
        return self.prompts[name]

    def query_prompt(self) -> str:
        """Return the string that `encode_query` prepends: the "query" prompt, or an empty one."""
        return self.prompts.get("query", "")

    def document_prompt(self) -> str:
        """Return the string that `encode_document` prepends: the first document prompt, or an empty one."""
        return next((self.prompts[name] for name in DOCUMENT_PROMPTS if name in self.prompts), "")

    def encode_query(
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        *batching: int | bool | None,
        **arguments: Unpack[ResultArguments],
    ) -> Any:  # noqa: ANN401 - what `encode` returns
        """Encode search queries: `encode`, with its arguments and the model's "query" prompt, if any."""
        if prompt_name is None and prompt is None:
            prompt = self.query_prompt()
        return self.encode(inputs, prompt_name, prompt, *batching, **arguments)

    def encode_document(
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        *batching: int | bool | None,
        **arguments: Unpack[ResultArguments],
    ) -> Any:  # noqa: ANN401
        """Encode documents: `encode` with the model's "document", "passage" or "corpus" prompt."""
        if prompt_name is None and prompt is None:
            prompt = self.document_prompt()
        return self.encode(inputs, prompt_name, prompt, *batching, **arguments)
