"""The console script `plumbline`: one subcommand a thing people do. `plumbline COMMAND --help` lists its settings."""

import importlib
import os
import sys
from collections.abc import Sequence

from plumbline.extensions import added

# name -> (module, what it does); a module is imported only when its command is asked for
COMMANDS = {
    "demo": (
        "plumbline.apps.demo",
        "the whole loop on the bundled model: SFT, reward model, PPO, DPO, evaluation, report",
    ),
    "upcycle": (
        "plumbline.apps.commands.upcycle",
        "turn a dense Llama-like model into a Mixture-of-Experts policy with the same logits",
    ),
    "sft": ("plumbline.align.sft", "supervised fine-tuning"),
    "reward-model": ("plumbline.align.reward_model", "train a reward model on preference pairs"),
    "eval-reward": (
        "plumbline.apps.commands.eval_reward",
        "how often rewards agree with people, on any preference pairs",
    ),
    "reward": (
        "plumbline.apps.commands.reward",
        "explain | tune | attack | check: a reward's parts, weights, weak spots",
    ),
    "curate": (
        "plumbline.apps.commands.curate",
        "filter and balance training data: duplicates, languages, garbage, domains",
    ),
    "ppo": ("plumbline.align.ppo", "PPO against the composite reward"),
    "self-answers": (
        "plumbline.align.self_answers",
        "an SFT set of a model's own answers, and declines in its own words",
    ),
    "sample-pairs": (
        "plumbline.align.sample_pairs",
        "preference pairs from a model's own answers, by the kind of prompt and by the reward",
    ),
    "safety-expert": ("plumbline.align.safety_expert", "train the adapter that SafeDecoding leans on"),
    "dpo": ("plumbline.align.dpo", "direct preference optimisation"),
    "eval": (
        "plumbline.apps.commands.evaluate",
        "suites x targets: attacks, over-refusal, bias, truth, leaks, capability, with error bars",
    ),
    "calibrate": (
        "plumbline.apps.commands.calibrate",
        "measure a judge against people's labels, and store how often it errs",
    ),
    "redteam": ("plumbline.apps.commands.redteam", "search for prompts that get past a target, within a budget"),
    "chat": (
        "plumbline.apps.chat.command",
        "guarded chat in the browser: what each layer saw, redacted, steered and verified",
    ),
    "label": ("plumbline.apps.label.command", "the preference-labelling app: serve, accounts, import, export, backup"),
    "label-loop": (
        "plumbline.apps.label.loop",
        "new labels into a new reward model, compared with the old one; re-orders the queue",
    ),
    "models": ("plumbline.apps.registry", "versions of trained models: list, promote, roll back"),
    "report": ("plumbline.apps.commands.report", "render report.html of a run folder"),
    "train-heads": ("plumbline.safety.training.train_heads", "train the classifier heads that ship in safety/weights"),
    "verify": ("plumbline.apps.commands.verify", "check an answer against documents: verdicts with citations"),
    "guard": (
        "plumbline.apps.guard.command",
        "check texts, explain verdicts, chat behind the guard, measure it, watch for drift",
    ),
    "doctor": ("plumbline.apps.doctor", "print versions, devices, threads, and which extras and weights are there"),
}


def usage() -> str:
    """The list of commands, with those that other packages add."""
    others = {
        name: f"from {e.dist.name if e.dist else e.value}" for name, e in added("plumbline.commands", COMMANDS).items()
    }
    listed = {name: what for name, (_, what) in COMMANDS.items()} | others
    width = max(len(name) for name in listed)
    lines = [f"  {name:<{width}}  {what}" for name, what in listed.items()]
    return "\n".join(["usage: plumbline COMMAND [settings]", "", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; a ValueError (bad input) becomes one line on standard error and exit status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status
    except ValueError as error:
        print(f"plumbline {argv[0]}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        return 141  # `| head` has read enough; 128 + SIGPIPE is what a shell says of any program that this happens to


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in COMMANDS:
        command = importlib.import_module(COMMANDS[argv[0]][0])
    elif (entry := added("plumbline.commands", COMMANDS).get(argv[0])) is not None:
        command = entry.load()
    else:
        print(f"plumbline: no command {argv[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    return command.main(argv[1:]) or 0


def _stdout_is_closed() -> bool:
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
