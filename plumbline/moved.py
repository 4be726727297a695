"""Import paths of release 0.1 and where their modules are now. Goes with release 0.3.

Then the packages were called `align`, `reward`, `safety` ... by themselves. In a clone such an import still finds a
folder of that name; it would load every module a second time, so it is refused, with the new name.
"""

import sys

MOVED = {
    "align.advantages": "plumbline.align.rl.advantages",
    "align.losses": "plumbline.align.rl.losses",
    "align.kl_control": "plumbline.align.rl.kl_control",
    "align.lagrangian": "plumbline.align.rl.lagrangian",
    "align.signals": "plumbline.align.rl.signals",
    "align.rollouts": "plumbline.align.rl.rollouts",
    "align.rollout_server": "plumbline.align.rl.rollout_server",
    "align.watch": "plumbline.align.rl.watch",
    "align.ppo_settings": "plumbline.align.rl.settings",
    "align.ppo_inputs": "plumbline.align.rl.inputs",
    "align.ppo_evaluation": "plumbline.align.rl.evaluation",
    "align.actors": "plumbline.align.models.actors",
    "align.answer_head": "plumbline.align.models.answer_head",
    "align.preferences": "plumbline.align.data.rows",
    "align.preference_formats": "plumbline.align.data.formats",
    "align.mixture": "plumbline.align.data.mixture",
    "reward.curation": "plumbline.align.data.curation",
    "reward.duplicates": "plumbline.align.data.duplicates",
    "reward.mixing": "plumbline.align.data.domain_weights",
    "align.launch": "plumbline.align.runtime.launch",
    "align.tracking": "plumbline.align.runtime.tracking",
    "align.checkpoints": "plumbline.align.runtime.checkpoints",
    "align.optim": "plumbline.align.runtime.optimizers",
    "align.pair_trainer": "plumbline.align.runtime.pair_trainer",
    "align.sharding": "plumbline.align.parallel.sharding",
    "align.compression": "plumbline.align.parallel.gradient_compression",
    "safety.constrained.train_expert": "plumbline.align.safety_expert",
    "safety.heads": "plumbline.safety.classifier",
    "safety.normalise": "plumbline.safety.text.normalise",
    "safety.words": "plumbline.safety.text.words",
    "safety.redaction": "plumbline.safety.text.redaction",
    "safety.obfuscations": "plumbline.safety.text.obfuscations",
    "safety.worst_piece": "plumbline.safety.text.worst_piece",
    "safety.embedding": "plumbline.safety.embedder.embedding",
    "safety.minilm": "plumbline.safety.embedder.minilm",
    "safety.train_heads": "plumbline.safety.training.train_heads",
    "safety.head_data": "plumbline.safety.training.head_data",
    "safety.refusal_sentences": "plumbline.safety.training.refusal_sentences",
    "safety.identity_sentences": "plumbline.safety.training.identity_sentences",
    "safety.card": "plumbline.safety.training.card",
    "safety.verifier.train_entailment": "plumbline.safety.training.train_entailment",
    "policy_models.generation": "plumbline.policy_models.rollout.generation",
    "policy_models.streaming": "plumbline.policy_models.rollout.streaming",
    "policy_models.decoder": "plumbline.policy_models.rollout.decoder",
    "policy_models.memory": "plumbline.policy_models.rollout.memory",
    "policy_models.trunk": "plumbline.policy_models.rollout.trunk",
    "policy_models.quantise": "plumbline.policy_models.compression.quantise",
    "eval.targets": "plumbline.eval.targets.specs",
    "eval.model_target": "plumbline.eval.targets.model_target",
    "eval.graders": "plumbline.eval.grading.graders",
    "eval.scorers": "plumbline.eval.grading.text_checks",
    "eval.refusals": "plumbline.eval.grading.refusal_rules",
    "eval.refusal_judge": "plumbline.eval.grading.refusal_judge",
    "eval.chat_judge": "plumbline.eval.grading.chat_judge",
    "eval.calibration": "plumbline.eval.grading.calibration",
    "eval.sandbox": "plumbline.eval.grading.sandbox",
    "eval.intervals": "plumbline.eval.stats.intervals",
    "eval.compare": "plumbline.eval.stats.gains",
    "eval.figures": "plumbline.eval.stats.suite_rates",
    "eval.preference_report": "plumbline.eval.stats.pair_accuracy",
    "eval.drawing": "plumbline.eval.plotting.axes",
    "eval.plots": "plumbline.eval.plotting.run_plots",
    "eval.preference_plots": "plumbline.eval.plotting.pair_plots",
    "eval.report": "plumbline.eval.pages.run_page",
    "eval.board": "plumbline.eval.pages.suite_page",
    "eval.gates": "plumbline.eval.gates.bounds",
    "eval.gate_run": "plumbline.eval.gates.after_training",
    "eval.inspect_adapter": "plumbline.eval.harnesses.inspect_adapter",
    "eval.lm_eval_adapter": "plumbline.eval.harnesses.lm_eval_adapter",
    "eval.lm_eval_agreement": "plumbline.eval.harnesses.lm_eval_agreement",
    "apps.model_registry": "plumbline.apps.registry",
    "apps.calibrate": "plumbline.apps.commands.calibrate",
    "apps.curate": "plumbline.apps.commands.curate",
    "apps.eval_reward": "plumbline.apps.commands.eval_reward",
    "apps.evaluation": "plumbline.apps.commands.evaluate",
    "apps.redteam": "plumbline.apps.commands.redteam",
    "apps.report": "plumbline.apps.commands.report",
    "apps.reward_tools": "plumbline.apps.commands.reward",
    "apps.upcycle": "plumbline.apps.commands.upcycle",
    "apps.verify": "plumbline.apps.commands.verify",
    "apps.guard": "plumbline.apps.guard.command",
    "apps.guard_bench": "plumbline.apps.guard.bench",
    "apps.chat": "plumbline.apps.chat.command",
    "apps.chat_app": "plumbline.apps.chat.server",
    "apps.label": "plumbline.apps.label.command",
    "apps.label_exchange": "plumbline.apps.label.exchange",
    "apps.label_arena": "plumbline.apps.label.arena",
    "apps.label_loop": "plumbline.apps.label.loop",
    "apps.label_store": "plumbline.apps.label.store.store",
    "apps.label_database": "plumbline.apps.label.store.database",
    "apps.label_queue": "plumbline.apps.label.store.queue",
    "apps.label_items": "plumbline.apps.label.store.items",
    "apps.label_votes": "plumbline.apps.label.store.votes",
    "apps.label_accounts": "plumbline.apps.label.store.accounts",
    "apps.label_answers": "plumbline.apps.label.store.answers",
    "apps.label_backup": "plumbline.apps.label.store.backup",
    "apps.label_api": "plumbline.apps.label.server.api",
    "apps.label_app": "plumbline.apps.label.server.pages",
    "apps.agreement": "plumbline.apps.label.study.agreement",
    "apps.label_statistics": "plumbline.apps.label.study.label_statistics",
    "apps.label_plots": "plumbline.apps.label.study.plots",
    "apps.web_guard": "plumbline.apps.web.request_guard",
}


class _OldNames:
    """An import hook that only answers for the packages that were imported by their old name."""

    packages: set[str] = set()

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:
        package = name.partition(".")[0]
        if package in cls.packages:
            sys.modules.pop(package, None)  # so that every further try says the same
            raise ImportError(f"{name} is now {MOVED.get(name, f'plumbline.{name}')}", name=name)


def refuse_old_name(package: str) -> None:
    """For a package to call first: imported by its old name, it names the new place of any module asked of it.

    Raises ImportError at the first `import package.module` or `from package import name` after this.
    """
    if package.startswith("plumbline."):
        return
    if not _OldNames.packages:
        sys.meta_path.insert(0, _OldNames)
    _OldNames.packages.add(package)
    stand_in = type(sys)(package, f"Now plumbline.{package}.")
    stand_in.__path__ = []  # a package, so that the import of a module of it reaches the hook
    stand_in.__getattr__ = lambda name: _moved_attribute(package, name)  # type: ignore[method-assign]
    sys.modules[package] = stand_in


def _moved_attribute(package: str, name: str) -> None:
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(f"{package}.{name} is now {MOVED.get(f'{package}.{name}', f'plumbline.{package}.{name}')}")
