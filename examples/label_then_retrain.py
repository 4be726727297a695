"""Labels into a reward model: a label database, an export in TRL's format, and the reward stage on it.

    python examples/label_then_retrain.py --labels 40

In life, people fill the database in the browser (`plumbline label`). Here a script answers in their place and always
prefers the shorter answer, so that you can watch the whole way at once. An export holds what was preferred, how
clearly (`margin`), and by which share of the annotators (`p_chosen`); it comes with a data card.
"""

import argparse
import secrets
from pathlib import Path

from plumbline.align import reward_model
from plumbline.apps.label.exchange import starter_items, write_export
from plumbline.apps.label.store.answers import Answer
from plumbline.apps.label.store.database import open_database
from plumbline.apps.label.store.store import LabelStore


def answer_tasks(store: LabelStore, account: int, count: int) -> int:
    """Labels up to `count` pairs as one annotator, the shorter answer being the better one; how many were labelled."""
    for done in range(count):
        task = store.next_task(account)["task"]
        if task is None:  # nothing left to label
            return done
        lengths = [len(shown["text"]) for shown in task["answers"]]
        answer = Answer(outcome="prefer", winner=lengths.index(min(lengths)), strength=2)
        store.submit(account, task["assignment"], secrets.token_hex(8), answer)
    return count


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=40, help="pairs to label")
    parser.add_argument("--model", default="bundled:tiny-llama", help="what the reward model starts from")
    parser.add_argument("--config", default="debug", help="settings of the reward stage: debug or demo")
    parser.add_argument("--out", default="runs/label_then_retrain", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    store = LabelStore(open_database(str(options.out / "labels.db")))
    added, _ = store.add_items(starter_items())
    account = store.add_account(f"script-{secrets.token_hex(4)}", secrets.token_urlsafe(16), "annotator")
    labelled = answer_tasks(store, account.id, options.labels)
    counts = write_export(store, options.out / "export", "preference")
    print(f"{added} pairs imported, {labelled} labelled, {counts['train']} rows in {options.out}/export/train.jsonl")

    data = ["--train_file", str(options.out / "export" / "train.jsonl"), "--output_dir", str(options.out / "reward")]
    reward_model.main(["--config", options.config, "--model", options.model, *data])


if __name__ == "__main__":
    main()
