"""Any prompt template as a chat template of transformers, to be saved with a tokenizer.

With it `pipeline(model)([{"role": "user", …}])`, `apply_chat_template` and servers write prompts as training did.
"""

import json
from typing import TYPE_CHECKING

from lola_ft.data.chat_template import ChatTemplate, PromptTemplate
from lola_ft.data.turns import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# One round of messages is one rendering of the template, as a macro; transformers runs it with the same settings.
_CHAT = """\
{%% macro rendered(messages, first, prompt) %%}
{%% set instruction = prompt %%}
{%% set input = "" %%}
%(source)s{%% endmacro %%}
{%% set state = namespace(said=[], text="", first=true) %%}
{%% for message in messages %%}
{%% if message["role"] == "assistant" %%}
%(single)s{{ rendered(state.said, state.first, state.text) }}{{ message["content"] }}{{ %(end)s }}
{%%- set state.said = [] %%}
{%% set state.text = "" %%}
{%% set state.first = false %%}
{%% else %%}
{%% set state.text = state.text + ("\\n\\n" if state.said else "") + message["content"] %%}
{%% set state.said = state.said + [message] %%}
{%% endif %%}
{%% endfor %%}
{%% if add_generation_prompt %%}
%(single)s{{ rendered(state.said, state.first, state.text) }}
{%%- endif %%}
"""
_SINGLE = """\
{% if not state.first %}{{ raise_exception("This template renders a single request and its answer.") }}{% endif %}
"""


def chat_source(template: PromptTemplate, tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return a template as jinja that transformers runs on `messages`, each answer ended as in training.

    A template for a single request refuses a second one. transformers tokenises the whole text at once, so that a token
    may span an answer's beginning where training had two.
    """
    if isinstance(template, ChatTemplate):
        return template.source
    end = next(word for word, number in special_tokens(tokenizer).items() if number == template.end_of(tokenizer))
    single = "" if template.renders_turns else _SINGLE
    return _CHAT % {"source": template.source.removesuffix("\n"), "end": json.dumps(end), "single": single}
