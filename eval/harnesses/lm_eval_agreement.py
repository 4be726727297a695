"""Do our capability suites say what lm-evaluation-harness says? Same rows, same model, both run here.

    python -m plumbline.eval.harnesses.lm_eval_agreement --target bundled:smollm2-135m-instruct --data DIR --suite arc_challenge --limit 100

lm-eval runs its own task files (their prompts, filters and metrics) with its own Hugging Face model class; only the source of
the rows is replaced by the local file. Ends with a line of JSON: both accuracies and how many rows differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from plumbline.eval.runner import ReplyStore, run_suites
from plumbline.eval.suites import load_suites
from plumbline.eval.suites.public import GSM8K_SHOTS, _value, read_set
from plumbline.eval.targets.model_target import ModelTarget
from plumbline.eval.targets.specs import open_target
from plumbline.policy_models.loading import resolve_model_source

# suite -> lm-eval's task files, our figure -> theirs
TASKS: dict[str, tuple[list[str], dict[str, str]]] = {
    "arc_challenge": (
        ["arc/arc_easy.yaml", "arc/arc_challenge.yaml"],
        {"correct": "acc", "correct_normed": "acc_norm"},
    ),
    "mmlu": (["mmlu/default/_default_template_yaml"], {"correct": "acc"}),
    "gsm8k": (["gsm8k/gsm8k.yaml"], {"flexible": "flexible-extract", "strict": "strict-match"}),
}
MMLU_HEAD = "The following are multiple choice questions (with answers) about {{subject.replace('_', ' ')}}.\n\n"


def lm_eval_task(
    suite: str, data: Path, rows: list[dict[str, Any]], folder: Path, max_new_tokens: int
) -> dict[str, Any]:  # fmt: skip
    """lm-eval's own configuration of a task, reading `rows` from a local file."""
    import lm_eval.tasks

    home = Path(lm_eval.tasks.__file__).parent
    config: dict[str, Any] = {}
    for file in TASKS[suite][0]:
        config |= yaml.safe_load((home / file).read_text(encoding="utf-8"))
    files = {"test": folder / "test.json"}
    files["test"].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if suite == "gsm8k":
        files["train"] = folder / "train.json"
        shots = read_set(data, "gsm8k/train")[:GSM8K_SHOTS]
        files["train"].write_text("".join(json.dumps(row) + "\n" for row in shots), encoding="utf-8")
        config["fewshot_config"] = {"sampler": "first_n"}
        config["generation_kwargs"] = config["generation_kwargs"] | {"max_gen_toks": max_new_tokens}
    else:
        config["num_fewshot"] = 0
    if suite == "mmlu":
        config["description"] = MMLU_HEAD
    for gone in ("include", "tag", "dataset_name", "validation_split", "should_decontaminate", "task_alias"):
        config.pop(gone, None)
    for split, key in (("training_split", "train"), ("fewshot_split", "train")):
        if split in config and key not in files:
            config.pop(split)
    local = {"data_files": {name: str(path) for name, path in files.items()}}
    return config | {"task": f"local_{suite}", "dataset_path": "json", "dataset_kwargs": local}


def compare(suite: str, target: ModelTarget, data: Path, limit: int, max_new_tokens: int = 256) -> dict[str, Any]:
    """Both accuracies of each figure on the same rows, and the rows on which they differ."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    (task,) = load_suites([suite], data=data, limit=limit)
    task = replace(task, max_new_tokens=max_new_tokens)
    raw = read_set(data, {"arc_challenge": "arc_challenge/questions"}.get(suite, f"{suite}/test"))
    by_id = (
        {row["id"]: row for row in raw}
        if suite == "arc_challenge"
        else {f"{suite}-{at}": r for at, r in enumerate(raw)}
    )
    rows = [_for_lm_eval(suite, by_id[sample.id]) for sample in task.samples]
    with tempfile.TemporaryDirectory() as folder:
        (ours,) = run_suites([target], [task], ReplyStore(folder), quiet=True)
        target.close()
        model = HFLM(resolve_model_source(target.source), dtype="float32", device="cpu", batch_size=8)
        found = lm_eval.simple_evaluate(
            model,
            tasks=[lm_eval_task(suite, data, rows, Path(folder), max_new_tokens)],
            bootstrap_iters=0,
            log_samples=True,
        )
    samples = found["samples"][f"local_{suite}"]
    out: dict[str, Any] = {"suite": suite, "rows": len(rows), "lm_eval": lm_eval.__version__}
    for mine, theirs in TASKS[suite][1].items():
        of_them = {
            s["doc_id"]: float(s["exact_match"] if suite == "gsm8k" else s[theirs])
            for s in samples
            if suite != "gsm8k" or s["filter"] == theirs
        }
        of_us = [float(score.value or 0) for score in ours.scores[mine]]
        differ = [at for at, value in enumerate(of_us) if value != of_them[at]]
        out[mine] = {"ours": sum(of_us) / len(of_us), "lm_eval": sum(of_them.values()) / len(of_them), "differ": differ}
    return out


def _for_lm_eval(suite: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row with the fields and types that lm-eval's task file expects of the hub's copy."""
    if suite == "mmlu":
        return {"subject": row["subject"], "question": row["question"], "choices": _value(row["choices"]),
                "answer": "ABCD".index(row["answer"])}  # fmt: skip
    if suite == "arc_challenge":
        choices = _value(row["choices"])
        labels = choices.get("label") or list("ABCDE")[: len(choices["text"])]
        return {
            "question": row["question"],
            "choices": {"text": choices["text"], "label": labels},
            "answerKey": row["answerKey"],
        }
    return {"question": row["question"], "answer": row["answer"]}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--data", required=True)
    parser.add_argument("--suite", default="arc_challenge", choices=list(TASKS))
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer to GSM8K, of both sides")
    args = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    target = open_target(args.target, dtype=torch.float32)
    if not isinstance(target, ModelTarget) or target.adapter:
        raise ValueError(f"--target {args.target}: needs a model source without an adapter, which lm-eval loads itself")
    print(json.dumps(compare(args.suite, target, Path(args.data), args.limit, args.max_new_tokens)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
