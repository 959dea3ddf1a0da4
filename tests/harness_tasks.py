"""Two tasks for lm-evaluation-harness that need no network, and their figures by transformers alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CHOICE, TEXT = "own_choice", "own_text"
QUESTIONS = [  # question, choices, the right one
    ("def main(", ["):\n", "x y"], 0),
    ("import o", ["s\n", "zz"], 0),
    ("for i in ran", ["ge(10):", "dom"], 0),
    ("return sel", ["q9", "f.x"], 1),
    ("class A:\n    pa", ["xx and more", "ss", "rt"], 1),
    ("while Tr", ["ap", "ue:"], 0),  # wrong, so that not all are right
]
TEXTS = ["def main():\n    return 1", "import os\nimport sys\n\nprint(os.name)"]

_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
{rest}
metadata:
  version: {version}
"""
_CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}"""
_TEXT = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}"""


def write_tasks(folder: Path) -> Path:
    """Writes both tasks and their data into a folder, which is returned."""
    folder.mkdir()
    choices = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS]
    for name, rows, rest, version in (
        (CHOICE, choices, _CHOICE, 1.5),
        (TEXT, [{"text": t} for t in TEXTS], _TEXT, 2.0),
    ):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (folder / f"{name}.yaml").write_text(_TASK.format(name=name, file=file, rest=rest, version=version))
    return folder


def naive_figures(model_folder: Path) -> dict[str, float]:
    """Computes the tasks' figures one sequence at a time, in float32."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    def log_likelihood(text: str, after: str | None) -> float:
        first = [tokenizer.eos_token_id] if after is None else tokenizer(after).input_ids
        ids = torch.tensor([first + tokenizer(text).input_ids if after is None else tokenizer(after + text).input_ids])
        with torch.no_grad():
            found = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        return float(found[len(first) - 1 :].sum())

    right, right_by_length = [], []
    for question, choices, answer in QUESTIONS:
        likely = [log_likelihood(choice, question) for choice in choices]
        by_length = [value / len(choice) for value, choice in zip(likely, choices, strict=True)]
        right.append(likely.index(max(likely)) == answer)
        right_by_length.append(by_length.index(max(by_length)) == answer)
    total = sum(log_likelihood(text, None) for text in TEXTS)
    n, acc, acc_norm = len(QUESTIONS), sum(right) / len(right), sum(right_by_length) / len(right)
    return {
        f"{CHOICE}/acc": acc,
        f"{CHOICE}/acc_stderr": math.sqrt(acc * (1 - acc) / (n - 1)),  # of a mean of 0s and 1s
        f"{CHOICE}/acc_norm": acc_norm,
        f"{CHOICE}/acc_norm_stderr": math.sqrt(acc_norm * (1 - acc_norm) / (n - 1)),
        f"{TEXT}/word_perplexity": math.exp(-total / sum(len(text.split()) for text in TEXTS)),
        f"{TEXT}/bits_per_byte": -total / sum(len(text.encode()) for text in TEXTS) / math.log(2),
    }
