"""lm-evaluation-harness both ways: our targets as one of its models, our suites as its YAML tasks.

    python -m plumbline.eval.harnesses.lm_eval_adapter --target runs/demo/ppo --tasks truthfulqa_mc1,toxigen --limit 100
    python -m plumbline.eval.harnesses.lm_eval_adapter --export tasks/           YAML and JSON Lines for `lm_eval --include_path tasks/`

The first runs lm-eval's own tasks, which read their data from the hub or its cache. Needs `pip install lm-eval`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError("this adapter needs lm-evaluation-harness: pip install lm-eval") from error

from plumbline.eval.runner import _cut
from plumbline.eval.suites import SUITES, load_suites
from plumbline.eval.targets.model_target import ModelTarget
from plumbline.eval.targets.specs import open_target
from plumbline.eval.targets.target import Target
from plumbline.eval.tasks import EvalTask


@register_model("plumbline")
class PlumblineLM(LM):
    """A target as lm-eval sees it. `lm_eval --model plumbline --model_args target=SPEC`, or an open target."""

    def __init__(self, target: str | Target, *, dtype: str = "float32", max_new_tokens: int = 256, **_: Any) -> None:
        super().__init__()
        import torch

        self.target: Target = open_target(target, dtype=getattr(torch, dtype)) if isinstance(target, str) else target
        self.max_new_tokens = max_new_tokens

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding would say it) of each continuation."""
        pairs = [request.args for request in requests]
        if isinstance(self.target, ModelTarget):
            return self.target.logp_and_greedy(pairs)
        return [(logp, False) for logp in self.target.logp(pairs)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts."""
        return self.target.logp([("", request.args[0]) for request in requests])

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Answers to plain texts, cut before the first stop string; requests with the same options are asked together."""
        alike: dict[tuple[int, float], list[int]] = {}
        for at, request in enumerate(requests):
            options = request.args[1]
            temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
            alike.setdefault((int(options.get("max_gen_toks", self.max_new_tokens)), temperature), []).append(at)
        texts = [""] * len(requests)
        for (longest, temperature), rows in alike.items():
            prompts = [requests[at].args[0] for at in rows]
            replies = self.target.reply(prompts, max_new_tokens=longest, temperature=temperature, seed=0)
            for at, reply in zip(rows, replies, strict=True):
                until = requests[at].args[1].get("until") or []
                texts[at] = _cut(reply.text, [until] if isinstance(until, str) else until)
        return texts


def export(task: EvalTask, folder: Path) -> Path:
    """Writes a suite of choices as an lm-eval task: plumbline_<suite>.yaml and its rows. ValueError for other suites."""
    if not task.asks_choices or not all(sample.target.isdigit() for sample in task.samples):
        raise ValueError(f"suite {task.name!r} has no right choices; only such suites can be lm-eval tasks")
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / f"plumbline_{task.name}.jsonl"
    lines = ({"id": s.id, "text": s.input, "choices": list(s.choices), "target": int(s.target)} for s in task.samples)
    rows.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    config = {
        "task": f"plumbline_{task.name}", "dataset_path": "json", "dataset_kwargs": {"data_files": str(rows.resolve())},
        "test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "target", "target_delimiter": "", "metadata": {"version": task.version},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    path = folder / f"plumbline_{task.name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    import lm_eval

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target")
    parser.add_argument("--tasks", default="")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--include", help="folder of further YAML tasks")
    parser.add_argument("--export", help="write our suites of choices as YAML tasks into this folder")
    args = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    if args.export:
        for task in load_suites(list(SUITES)):
            if task.asks_choices and all(sample.target.isdigit() for sample in task.samples):
                print(export(task, Path(args.export)))
        return 0
    if not args.target or not args.tasks:
        raise ValueError("give --target and --tasks, or --export")
    manager = lm_eval.tasks.TaskManager(include_path=args.include)
    found = lm_eval.simple_evaluate(
        PlumblineLM(args.target), tasks=args.tasks.split(","), limit=args.limit, task_manager=manager, bootstrap_iters=0
    )
    print(
        json.dumps(
            {name: {k: v for k, v in of.items() if isinstance(v, int | float)} for name, of in found["results"].items()}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
