"""Prompt templates, which write the text before an answer, the same in training and at inference.

A template is a jinja file, bundled or the user's own. Its only variables are `instruction`, `input`, `prompt` (the two
joined), `messages` (those since the last answer, each with `role` and `content`) and `first` (true before the first
answer). It renders the text before one answer. A conversation is its exchanges one after another, each answer ended by
EOS. Templates run in jinja's sandbox, because a template may come with another person's adapter.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lola_ft.data.example import Example, Fields, is_learned, messages_before, prompt_fields
from lola_ft.data.turns import Turn, encode_texts, eos_of, pattern_of, refuse_marks, special_tokens
from lola_ft.errors import DataError
from lola_ft.files import missing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FOLDER = Path(__file__).parent / "templates"

_CONTENT = "What is said."

_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined,
    autoescape=False,
    trim_blocks=True,  # a line with only a block tag leaves no line break
    lstrip_blocks=True,
    keep_trailing_newline=False,  # editors end a file with a line break that does not belong to the prompt
)


@dataclass(frozen=True)
class Template:
    """A prompt template. Saving `source` as a .jinja file and loading it gives the same prompts."""

    name: str
    source: str

    @classmethod
    def load(cls, name_or_path: str) -> "Template":
        """Load a bundled template by its name, or a file whose path ends in .jinja, and check it."""
        bundled = sorted(file.stem for file in _FOLDER.glob("*.jinja"))
        if not name_or_path.endswith(".jinja") and name_or_path not in bundled:
            raise DataError(
                f"template '{name_or_path}' is unknown. Choose {', '.join(bundled)}, or chat for the tokenizer's own "
                "chat template, or give the path of your own template, which ends in .jinja."
            )
        path = _FOLDER / f"{name_or_path}.jinja" if name_or_path in bundled else Path(name_or_path)
        template = cls(name_or_path, _read(path))
        template._check()
        return template

    def render(self, example: Example) -> list[str]:
        """Render the prompt in front of each answer of an example, in their order.

        Raises:
            DataError: The example has several answers but the template renders a single request, or the user's own
                template fails on the example.
        """
        assert example.prompt is not None, "a text example has no prompt to render"
        if example.earlier and not self.renders_turns:
            raise DataError(
                f"{example.where}: a conversation with {len(example.exchanges)} answers, and template {self.name} "
                "renders a single request. Set data.template to chatml, or use `messages` in a template of your own."
            )
        for fields, _ in example.exchanges:
            if example.tools or fields.get("reply", {}).get("tool_calls"):
                raise DataError(
                    f"{example.where}: the conversation has {'tools' if example.tools else 'tool calls'}, which "
                    f"template {self.name} cannot write. Set data.template to chat with a base whose chat template "
                    "supports them, or remove them from the rows."
                )
        exchanges = enumerate(example.exchanges)
        return [self._render(fields, first=index == 0, where=f"{example.where}: ") for index, (fields, _) in exchanges]

    def turns(self, examples: list[Example], tokenizer: "PreTrainedTokenizerFast") -> list[list[Turn]]:
        """Return the turns of examples with prompts as token ids.

        Prompt and answer are tokenised separately. A special token in the template, such as `<|im_start|>`, becomes one
        token if the tokenizer has it. The same text in a message is read as characters, or refused if the two could be
        confused.
        """
        prompts = iter(self._encoded_prompts(examples, tokenizer))
        answers = iter(encode_texts([answer for row in examples for _, answer in row.exchanges], tokenizer))
        end = self.end_of(tokenizer)
        return [
            [
                Turn(next(prompts), [*next(answers), end], answer, is_learned(fields))
                for fields, answer in example.exchanges
            ]
            for example in examples
        ]

    def prompt_ids(self, example: Example, tokenizer: "PreTrainedTokenizerFast") -> list[int]:
        """Return the token ids of everything before an example's last answer, as in training."""
        *earlier, last = self.turns([example], tokenizer)[0]
        return [*(token for turn in earlier for token in (*turn.prompt, *turn.answer)), *last.prompt]

    def end_of(self, tokenizer: "PreTrainedTokenizerFast") -> int:
        """Return the id of the token that ends an answer.

        If the template ends the user's turn with a special token of the tokenizer, such as `<|im_end|>`, it is that
        token; otherwise the end-of-text token.
        """
        marks = self._marks(tokenizer)
        if marks and self.renders_turns:
            tail = self._render(prompt_fields(_CONTENT), first=True).rpartition(_CONTENT)[2]
            found = list(pattern_of(marks).finditer(tail))
            if len(found) > 1 and found[0].start() == 0:  # the last mark begins the answer
                return marks[found[0][0]]
        return eos_of(tokenizer)

    def _marks(self, tokenizer: "PreTrainedTokenizerFast") -> dict[str, int]:
        """Return the tokenizer's special tokens that occur in the template."""
        return {word: number for word, number in special_tokens(tokenizer).items() if word in self.source}

    def _encoded_prompts(self, examples: list[Example], tokenizer: "PreTrainedTokenizerFast") -> list[list[int]]:
        marks = self._marks(tokenizer)
        for example in examples if marks else ():
            said = [message for fields, _ in example.exchanges for message in messages_before(fields)]
            texts = {f"message {place}": message["content"] for place, message in enumerate(said, start=1)}
            refuse_marks(texts, pattern_of(special_tokens(tokenizer)), example.where)
        return encode_texts([prompt for row in examples for prompt in self.render(row)], tokenizer, bool(marks))

    def prompt(self, instruction: str, input: str = "") -> str:
        """Render the prompt of a single request, for inference."""
        return self._render(prompt_fields(instruction, input), first=True)

    @cached_property
    def renders_turns(self) -> bool:
        """True if the template can render a conversation of several turns."""
        return "messages" in meta.find_undeclared_variables(_ENVIRONMENT.parse(self.source))

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return _ENVIRONMENT.from_string(self.source)

    def _render(self, fields: Fields, first: bool, where: str = "") -> str:
        try:
            return self._compiled.render(_visible(fields, first))
        except Exception as error:  # the user's own template may raise anything
            raise DataError(f"{where}template {self.name} fails: {str(error).rstrip('.')}.") from None

    def _check(self) -> None:
        """Raise DataError for a template that would fail, or leave out the request, on every row."""
        try:
            used = meta.find_undeclared_variables(_ENVIRONMENT.parse(self.source))
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"{self.name}:{error.lineno}: broken template: {str(error.message).rstrip('.')}.") from None
        known = _visible(prompt_fields("one", "two"), first=True)
        if unknown := sorted(used - set(known)):
            raise DataError(f"template {self.name} uses '{unknown[0]}'; it may use only {', '.join(known)}.")
        if not {"instruction", "prompt", "messages"} & used:
            raise DataError(
                f"template {self.name} leaves the request out. Use `instruction`, `prompt` or `messages` in it."
            )
        if "instruction" in used and not {"input", "prompt", "messages"} & used:
            raise DataError(f"template {self.name} leaves `input` out. Use it too, or `prompt`, which has both.")
        self._render(prompt_fields("one", "two"), first=True)
        self._render(prompt_fields("one", "two"), first=False)


def _visible(fields: Fields, first: bool) -> dict[str, Any]:
    """Return a template's variables; a request without messages becomes one message of the user."""
    seen = {name: fields[name] for name in ("instruction", "input", "prompt")}
    return {"messages": messages_before(fields), "first": first} | seen


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(missing(path, "template")) from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text. Save the template as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
