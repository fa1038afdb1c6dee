"""The verb `lola-ft generate`."""

import json
import sys
from pathlib import Path
from typing import Any

from lola_ft.data import PromptTemplate, check_template
from lola_ft.data.example import Example, prompt_fields
from lola_ft.errors import UserError
from lola_ft.files import write_text
from lola_ft.generation.answers import Answer, Sampling, answer_in_order, answer_one, check_room
from lola_ft.generation.chat import TerminalStreamer
from lola_ft.generation.chat import chat as talk
from lola_ft.generation.prompts import STANDARD_INPUT, prompt_from_standard_input, read_prompts, request, template_of
from lola_ft.open_model import OpenModel, open_model


def generate_command(
    model: str,
    base: str | None = None,
    adapter: str | None = None,
    prompt: str | None = None,
    file: str | None = None,
    chat: bool = False,
    template: str | None = None,
    sampling: Sampling | None = None,
    quantization: str = "auto",
    batch_size: int = 32,
    out: str | None = None,
) -> None:
    """Answer one prompt, a file of prompts, or a conversation; raises UserError for options that do not fit."""
    if sum((prompt is not None, file is not None, chat)) != 1:
        raise UserError("Give one of --prompt TEXT, --file FILE and --chat.")
    if out and chat:
        raise UserError("--out does nothing with --chat. Leave it out.")
    if prompt == STANDARD_INPUT:
        prompt = prompt_from_standard_input()
    sampling = sampling or Sampling()
    asked = read_prompts(file) if file else []
    if template:
        check_template(template)
    opened = open_model(model, base, quantization=quantization, adapter=adapter)
    template_used = template_of(opened, template)
    if chat:
        talk(opened.model, opened.tokenizer, template_used, sampling)
        return
    if prompt is not None:
        rows = [{"prompt": prompt}]
        answers = [_streamed(opened, request(prompt_fields(prompt)), template_used, sampling)]
    else:
        rows = [entry.row for entry in asked]
        ids_of = [template_used.prompt_ids(entry.example, opened.tokenizer) for entry in asked]
        for entry, ids in zip(asked, ids_of, strict=True):
            check_room(ids, opened.sizes.positions, f"{entry.example.where}: the prompt")
        end = template_used.end_of(opened.tokenizer)
        answers = answer_in_order(opened.model, opened.tokenizer, ids_of, sampling, batch_size, end)
    _write(rows, answers, out, printed=prompt is not None)


def _streamed(opened: OpenModel, asked: Example, template: PromptTemplate, sampling: Sampling) -> Answer:
    ids, end = template.prompt_ids(asked, opened.tokenizer), template.end_of(opened.tokenizer)
    positions = opened.sizes.positions
    check_room(ids, positions)
    answer = answer_one(opened.model, opened.tokenizer, ids, sampling, TerminalStreamer(opened.tokenizer), end)
    if not answer.ended:
        used_up = len(ids) + answer.tokens >= positions
        cause = f"all {positions} positions of the model are used" if used_up else "raise --max-new-tokens for more"
        print(f"(cut after {answer.tokens} tokens, before the model ended its answer: {cause})", file=sys.stderr)
    return answer


def _write(rows: list[dict[str, Any]], answers: list[Answer], out: str | None, printed: bool) -> None:
    """Write one JSON object per prompt to the file or, if answers were not printed yet, to stdout."""
    lines = [
        json.dumps(row | {"answer": answer.text, "ended": answer.ended, "tokens": answer.tokens}, ensure_ascii=False)
        for row, answer in zip(rows, answers, strict=True)
    ]
    cut = sum(not answer.ended for answer in answers)
    if cut and not printed:
        print(f"{cut} of {len(answers)} answers were cut before the model ended them.", file=sys.stderr)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_text(out, "".join(f"{line}\n" for line in lines))
    elif not printed:
        print("\n".join(lines))
