"""Script that tests run in its own process, with some version of transformers and without lola_ft:

    python drive.py FOLDER IO OUT

It loads the model in FOLDER with the code beside its weights, runs it on the golden inputs in IO, and writes the
results to OUT: `tensors.safetensors` and `facts.json`. It checks nothing itself.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

folder, out = sys.argv[1], Path(sys.argv[3])
golden = load_file(sys.argv[2])
ids, mask, labels = golden["input_ids"], golden["attention_mask"], golden["labels"]
torch.set_num_threads(1)
tensors, facts = {}, {"version": transformers.__version__}


def load(**options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def greedy(model, prompt, mask=None, **options):
    chosen = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 1} | options
    return model.generate(prompt, attention_mask=torch.ones_like(prompt) if mask is None else mask, **chosen)


def gradients(model):
    model.zero_grad()
    found = model(ids, attention_mask=mask, labels=labels, output_router_logits=True, output_hidden_states=True)
    (found.loss + found.aux_loss).backward()
    return found, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
began = time.perf_counter()
model = load()
facts["load_s"] = time.perf_counter() - began
facts["loading"] = {key: sorted(map(str, value)) for key, value in info.items()}
facts["classes"] = [f"{cls.__module__}.{cls.__name__}" for cls in (type(model), type(model.config))]
facts["attention"] = model.config._attn_implementation
facts["tied"] = model.lm_head.weight is model.transformer.wte.weight
prompt = golden["base.greedy"][:, :8]
for attention in ("sdpa", "eager"):
    model = load(attn_implementation=attention, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    found, grads = gradients(model)
    for name in ("logits", "loss", "aux_loss"):
        tensors[f"{attention}.{name}"] = getattr(found, name).detach()
    tensors[f"{attention}.router_logits"] = torch.stack(found.router_logits).detach()
    tensors[f"{attention}.hidden_states"] = torch.stack(found.hidden_states).detach()
    tensors |= {f"{attention}.grad.{name}": grad for name, grad in grads.items()}
    tensors[f"{attention}.greedy"] = greedy(model, prompt)
    tensors[f"{attention}.greedy_without_cache"] = greedy(model, prompt, use_cache=False)
    tensors[f"{attention}.beams"] = greedy(model, prompt[:1], num_beams=3)
    tensors[f"{attention}.beams_without_cache"] = greedy(model, prompt[:1], num_beams=3, use_cache=False)
    # The first prompt with four tokens of padding before it, in a batch with a row of full width.
    padded, real = torch.ones(2, 12, dtype=torch.long), torch.ones(2, 12, dtype=torch.long)
    padded[0, 4:], padded[1], real[0, :4] = prompt[0], torch.arange(20, 32), 0
    tensors[f"{attention}.left_padded"] = greedy(model, padded, real)
    if attention == "eager":
        attentions = model(ids, attention_mask=mask, output_attentions=True).attentions
        tensors["eager.attentions"] = torch.stack(attentions).detach()

model = load(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0).train()
model.gradient_checkpointing_enable()
tensors |= {f"checkpointed.grad.{name}": grad for name, grad in gradients(model)[1].items()}
summed = load()(ids, attention_mask=mask, labels=labels, num_items_in_batch=10).loss
tensors["loss_of_10_items"] = summed.detach()
tensors["last_logits"] = load()(ids, attention_mask=mask, logits_to_keep=1).logits.detach()
backbone = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
tensors["backbone"] = backbone(ids, attention_mask=mask, return_dict=False)[0].detach()
half = load(torch_dtype=torch.bfloat16)
tensors["bfloat16.logits"] = half(ids, attention_mask=mask).logits.detach().float()

tokenizer = AutoTokenizer.from_pretrained(folder)
facts["tokens"] = tokenizer("Jina langu ni Amina").input_ids
facts["template"] = tokenizer.chat_template
write = pipeline("text-generation", model=folder, trust_remote_code=True)
facts["text"] = write("Jina langu ni", max_new_tokens=8, do_sample=False)[0]["generated_text"]

model.gradient_checkpointing_disable()
model.eval().save_pretrained(out / "saved")
before, saved = (load_file(Path(place, "model.safetensors")) for place in (folder, out / "saved"))
facts["saved"] = {name: torch.equal(tensor, before[name]) for name, tensor in saved.items()}

if len(sys.argv) > 4:  # the authors' adapter, by stock PEFT
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load(), sys.argv[4]).eval()
    tensors["lora.logits"] = adapted(ids, attention_mask=mask).logits.detach()
    tensors["merged.logits"] = adapted.merge_and_unload()(ids, attention_mask=mask).logits.detach()

facts["lola_ft"] = "lola_ft" in sys.modules
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "tensors.safetensors")
(out / "facts.json").write_text(json.dumps(facts))
