"""Whether others load what a run made: transformers, vLLM and lm-eval, in a virtual environment without this project.

    python -m benchmarks.elsewhere MODEL [MODEL ...] [--venv .venv-elsewhere]

Makes the virtual environment first: the lock of this machine's set-up, without the project, and lm-eval. Then each
model (a folder such as runs/NAME/models/sft, or one that `tenfold export` wrote) goes on with a text under transformers
and vLLM, greedily, and answers a local task of lm-eval (which of two words is likelier, 20 questions made here).
The two engines must write the same tokens. Exit code 1 if anything fails or differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LM_EVAL = "lm-eval==0.4.13"
TEXT = "The sea and the wind"
NUM_TOKENS = 12

LOADED = """
import json, os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1",
               "VLLM_LOGGING_LEVEL": "ERROR"}
folder, text, num = sys.argv[1], sys.argv[2], int(sys.argv[3])
for name in ("rlhf", "actors", "cluster", "configs"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"the project is in this environment: {name}")
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
asked = tokenizer(text, return_tensors="pt")
ids = asked["input_ids"]
# With its mask: without one, `generate` takes a BOS that is the padding token too for padding.
written = model.generate(
    ids, attention_mask=asked["attention_mask"], max_new_tokens=num, do_sample=False, pad_token_id=0, eos_token_id=None
)
plain = written[0, ids.shape[1]:].tolist()
from vllm import LLM, SamplingParams
engine = LLM(
    folder, dtype="float32", enforce_eager=True, max_model_len=64, kv_cache_memory_bytes=1 << 26, block_size=32
)
params = SamplingParams(temperature=0.0, max_tokens=num, ignore_eos=True)
served = list(engine.generate([{"prompt_token_ids": ids[0].tolist()}], params)[0].outputs[0].token_ids)
print("RESULT " + json.dumps({"transformers": plain, "vllm": served, "text": tokenizer.decode(plain)}))
"""

EVALUATED = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
folder, tasks = sys.argv[1], sys.argv[2]
found = lm_eval.simple_evaluate(
    model="hf", model_args={"pretrained": folder, "dtype": "float32"}, tasks=["continue_text"], device="cpu",
    batch_size=1, bootstrap_iters=0, task_manager=TaskManager(include_path=tasks, include_defaults=False),
)
print("RESULT " + json.dumps({"accuracy": found["results"]["continue_text"]["acc,none"]}))
"""

TASK = """
task: continue_text
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{given}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{right}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def main() -> int:
    """0 if every model loads everywhere and both engines agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--venv", type=Path, default=Path(".venv-elsewhere"))
    options = parser.parse_args()
    python = make_venv(options.venv)
    agreed = True
    with tempfile.TemporaryDirectory() as folder:
        tasks = write_task(Path(folder))
        for model in options.models:
            written = ask(python, LOADED, str(model.resolve()), TEXT, str(NUM_TOKENS), cwd=folder)
            judged = ask(python, EVALUATED, str(model.resolve()), str(tasks), cwd=folder)
            same = written["transformers"] == written["vllm"]
            agreed &= same
            print(f"{model}: {TEXT!r} -> {written['text']!r}")
            print(f"    transformers and vLLM {'write the same tokens' if same else 'DIFFER: ' + json.dumps(written)}")
            print(f"    lm-eval, hf backend, local task: accuracy {judged['accuracy']:.2f}")
    return int(not agreed)


def make_venv(folder: Path) -> Path:
    """The interpreter of an environment that has all of the lock but not this project."""
    python = folder.absolute() / "bin" / "python"
    done = folder / "made"
    if not done.exists():
        print(f"making {folder}", flush=True)
        lock = ROOT / "requirements" / "cpu.lock"
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", "-r", str(lock)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", LM_EVAL], check=True)
        done.touch()
    return python


def write_task(folder: Path) -> Path:
    """The folder of lm-eval's task: 20 questions about which word comes next."""
    words = ("sea", "wind", "stone", "river", "light", "cloud", "tree", "bird", "fire", "night")
    rows = [
        {
            "given": f"the {word}, the {word}, the",
            "choices": [f" {word}", f" {words[(i - 1) % len(words)]}"],
            "right": 0,
        }
        for i, word in enumerate(words * 2)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "continue_text.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    return folder


def ask(python: Path, program: str, *arguments: str, cwd: str) -> dict[str, object]:
    """What a program in the other environment found out. Raises SystemExit with its output if it fails."""
    made = subprocess.run([str(python), "-I", "-c", program, *arguments], capture_output=True, text=True, cwd=cwd)
    for line in reversed(made.stdout.splitlines()):
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(f"it failed elsewhere:\n{made.stdout[-2000:]}\n{made.stderr[-4000:]}")


if __name__ == "__main__":
    raise SystemExit(main())
