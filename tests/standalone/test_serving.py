"""An exported folder on other engines: transformers' own server, the harness, and the interface of vLLM and SGLang."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from lola_ft.model import LolaForCausalLM
from lola_ft.standalone.export import export
from tests.conftest import make_base
from tests.standalone.conftest import GOLDEN

NUMBERS = "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model that has learned to count, so that its answers are words."""
    folder = make_base(tmp_path_factory.mktemp("counting") / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    model = LolaForCausalLM.from_pretrained(folder).train()
    ids = torch.tensor([tokenizer(NUMBERS).input_ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    model.save_pretrained(folder)
    export(folder, folder.with_name("lola"))
    return folder.with_name("lola")


@pytest.fixture(scope="module")
def server(
    counting: Path,
    elsewhere: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """Start `transformers serve` with its remote-code switch, offline, and yield its address."""
    pytest.importorskip("openai", reason="`transformers serve` needs the extra `serving` of transformers")
    pytest.importorskip("uvicorn", reason="`transformers serve` needs the extra `serving` of transformers")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    log = tmp_path_factory.mktemp("served") / "log"
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        counting,
        "--trust-remote-code",
        "--device",
        "cpu",
        "--port",
        port,
    ]
    with log.open("w") as handle:
        process = subprocess.Popen(list(map(str, command)), env=elsewhere, stdout=handle, stderr=handle)
    try:
        wait_for(f"http://localhost:{port}/health", process, log)
        yield f"http://localhost:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address)
        except urllib.error.URLError:
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"the server does not answer: {log.read_text()}")


@pytest.mark.slow
def test_transformers_serve_answers_and_streams_to_several_clients(server: str, counting: Path) -> None:
    from openai import OpenAI

    words = NUMBERS.split()
    prompts = [" ".join(words[:count]) for count in (1, 2, 3, 4)]
    model = str(counting)

    def ask(prompt: str, stream: bool) -> str:
        client = OpenAI(base_url=server, api_key="none")
        messages: Any = [{"role": "user", "content": prompt}]
        answer: Any = client.chat.completions.create(
            model=model, messages=messages, max_tokens=8, temperature=0, stream=stream
        )
        if not stream:
            assert answer.usage.completion_tokens > 0
            return answer.choices[0].message.content
        pieces = [chunk.choices[0].delta.content for chunk in answer if chunk.choices]
        return "".join(piece for piece in pieces if piece)

    alone = [ask(prompt, stream=False) for prompt in prompts]
    for prompt, answer in zip(prompts, alone, strict=True):
        assert NUMBERS.startswith(prompt + answer)
        assert len(answer.split()) >= 2
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: ask(prompt, stream=True), prompts))
    assert together == alone
    written = OpenAI(base_url=server, api_key="none").completions.create(
        model=model, prompt=prompts[0], max_tokens=8, temperature=0
    )
    assert written.choices[0].text == alone[0]


TASK = """task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["one", "two"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


@pytest.mark.slow
def test_the_harness_loads_the_folder_itself(golden_export: Path, elsewhere: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK)
    rows = [{"question": f"Count {i}: ", "answer": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = f"pretrained={golden_export},trust_remote_code=True"
    command = [
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        given,
        "--tasks",
        "tiny_choice",
        "--include_path",
        "tasks",
    ]
    command = [sys.executable, *command, "--device", "cpu", "--batch_size", "2", "--output_path", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())
    assert results["results"]["tiny_choice"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
    assert results["n-samples"]["tiny_choice"]["effective"] == 4


ENGINE = """
import sys
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

folder, golden = sys.argv[1], load_file(sys.argv[2])
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
backbone = get_class_from_dynamic_module(config.auto_map["AutoModel"], folder)
assert backbone.is_backend_compatible()

calls = []
def engine(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    # As vLLM and SGLang do: rows of several requests one after another, told apart by what the engine passes.
    calls.append((module.layer_idx, attention_mask))
    outs = [
        nn.functional.scaled_dot_product_attention(
            *(part[:, :, first:last] for part in (query, key, value)), is_causal=True, scale=scaling
        )
        for first, last in attention_instances[module.layer_idx]
    ]
    return torch.cat(outs, dim=2).transpose(1, 2), None

ALL_ATTENTION_FUNCTIONS.register("engine", engine)
with torch.device("meta"):
    AutoModel.from_config(config, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
model.config._attn_implementation = "engine"
rows = golden["input_ids"][:2]
bounds = [(0, rows.shape[1]), (rows.shape[1], 2 * rows.shape[1])]
given = {
    "input_ids": rows[:2].reshape(1, -1),
    "position_ids": torch.arange(rows.shape[1]).repeat(2)[None],
    "use_cache": False,
    "return_dict": False,
    "attention_instances": {layer: bounds for layer in range(config.num_hidden_layers)},
}
with torch.no_grad():
    together = model(**given)[0]
    embedded = dict(given, input_ids=None, inputs_embeds=model.get_input_embeddings()(given["input_ids"]))
    from_embeddings = model(**embedded)[0]
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)(**given)[0]
assert [layer for layer, _ in calls][:config.num_hidden_layers] == list(range(config.num_hidden_layers))
assert all(mask is None for _, mask in calls)
experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
assert experts and not any(isinstance(module, nn.ModuleList) for module in experts)  # vLLM would replace them
save_file({"together": together, "embedded": from_embeddings, "compiled": compiled}, sys.argv[3])
"""


@pytest.mark.slow
def test_an_engine_can_replace_attention(
    golden_export: Path, elsewhere: dict[str, str], golden: dict[str, Tensor], tmp_path: Path
) -> None:
    """The model runs as in the transformers backends of vLLM and SGLang, with a stand-in for their attention.

    These call the backbone without mask and cache, with the positions of several requests in one row and arguments that
    only their attention uses, and compile it as one graph.
    """
    (tmp_path / "engine.py").write_text(ENGINE)
    command = [sys.executable, "engine.py", str(golden_export), str(GOLDEN / "io.safetensors"), "out.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, env=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    native = LolaForCausalLM.from_pretrained(GOLDEN / "base").eval()
    with torch.no_grad():
        expected = native.transformer(golden["input_ids"][:2]).last_hidden_state.reshape(1, -1, 64)
    for found in load_file(tmp_path / "out.safetensors").values():
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
