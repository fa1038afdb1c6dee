"""The Auto classes load the native model, in either order of importing lola_ft and transformers."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from lola_ft.model import LolaConfig

ROOT = Path(__file__).parents[2]
ORDERS = {
    "lola_ft first": "import lola_ft\nfrom transformers import AutoConfig, AutoModelForCausalLM",
    "transformers first": "from transformers import AutoConfig, AutoModelForCausalLM\nimport lola_ft",
    "lola_ft between": "from transformers import AutoConfig\nimport lola_ft\n"
    "from transformers import AutoModelForCausalLM",
    "both reloaded": """
import importlib
import lola_ft, transformers.models.auto.modeling_auto as auto
importlib.reload(lola_ft)
AutoModelForCausalLM = importlib.reload(auto).AutoModelForCausalLM
from transformers import AutoConfig
""",
    "in threads": """
import sys, threading
import lola_ft, transformers  # transformers itself cannot be imported by several threads at once
def load():
    from transformers import AutoConfig, AutoModelForCausalLM
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
threads = [threading.Thread(target=load) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
from transformers import AutoConfig, AutoModelForCausalLM
""",
}
CHECK = """
import sys
config = AutoConfig.from_pretrained(sys.argv[1])
assert not any(name.startswith("transformers_modules") for name in sys.modules)
print(type(config).__module__, type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)
"""


def python(code: str, *arguments: str) -> str:
    """Run code in its own process and return its output."""
    command = [sys.executable, "-c", code, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("order", [pytest.param(name, marks=pytest.mark.slow) for name in ORDERS])
def test_auto_classes_give_the_native_model(order: str, golden_base: Path) -> None:
    assert python(ORDERS[order] + CHECK, str(golden_base)) == "lola_ft.model.config lola_ft.model.modeling"


@pytest.mark.slow
def test_a_pickled_config_registers_the_model_where_it_is_read(tmp_path: Path) -> None:
    """A spawned worker is like this: it imports lola_ft only because the config's class is defined there."""
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(LolaConfig()))
    code = (
        "import pickle, sys, pathlib\n"
        "config = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "from transformers import AutoConfig\n"
        "print(type(AutoConfig.for_model('lola_v1')) is type(config))"
    )
    assert python(code, str(tmp_path / "config.pkl")) == "True"
