"""Conversion of a prompt template to a transformers chat template, which is saved with the tokenizer.

So `pipeline(model)([{"role": "user", …}])`, `apply_chat_template` and servers write prompts as training did.
"""

import json
from typing import TYPE_CHECKING

from lola_ft.data.chat_template import ChatTemplate, PromptTemplate
from lola_ft.data.turns import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A macro renders the template once per round of messages. transformers uses the same jinja settings as we do.
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
    """Return a template as jinja that transformers can run on `messages`, with the same end of answers as in training.

    A template for a single request refuses a second request. transformers tokenises the whole text at once, so a token
    may span the beginning of an answer where training had two tokens.
    """
    if isinstance(template, ChatTemplate):
        return template.source
    end = next(word for word, number in special_tokens(tokenizer).items() if number == template.end_of(tokenizer))
    single = "" if template.renders_turns else _SINGLE
    return _CHAT % {"source": template.source.removesuffix("\n"), "end": json.dumps(end), "single": single}
