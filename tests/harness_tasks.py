"""Tasks of lm-evaluation-harness as local files: no registry, no network."""

import json
from pathlib import Path

COMMON = """\
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
metadata: {{version: 1}}
"""
CHOICE = """\
task: {name}
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """\
task: {name}
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
"""
UNTIL = """\
task: {name}
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["\\n\\n\\n"], max_gen_toks: 8, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
KINDS = {"choice": CHOICE, "rolling": ROLLING, "until": UNTIL}


def write_task(folder: Path, name: str, kind: str, documents: list[dict[str, object]]) -> None:
    """Write one task's yaml and its documents.

    Args:
        folder: Of all tasks.
        name: The task's name.
        kind: "choice" (context, choices, answer), "rolling" (text) or "until" (context, text).
        documents: One a line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in documents), encoding="utf-8")
    text = (KINDS[kind] + COMMON).format(name=name, data=data, cache=folder / "cache")
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
