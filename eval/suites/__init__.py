"""The suites by name. One that needs data from outside (`--data DIR`) has its loader in eval/suites/public.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from plumbline.eval.suites import (
    attacks,
    behaviour,
    bias,
    capability,
    injection,
    leakage,
    public,
    refusals,
    toxic,
    truth,
)
from plumbline.eval.tasks import EvalTask
from plumbline.extensions import added

# name -> a function that reads the samples; each file says what its suites ask
SUITES: dict[str, Callable[[], EvalTask]] = {
    suite.__name__: suite
    for suite in (
        attacks.harmful_direct, attacks.harmful_templates, attacks.harmful_obfuscated, attacks.harmful_multi_turn,
        attacks.harmful_insisted,
        refusals.over_refusal, refusals.ordinary,
        injection.injection_direct, injection.injection_indirect, injection.system_prompt,
        toxic.toxic_bait, toxic.toxic_continuation,
        bias.identity_swap, bias.stereotype_pairs, bias.bias_questions,
        truth.misconceptions, truth.fact_recall, truth.fact_numbers,
        leakage.personal_data, leakage.secrets,
        behaviour.sycophancy, behaviour.paraphrase, behaviour.calibration, behaviour.reward_profile,
        capability.quiz, capability.arithmetic, capability.code,
    )
}  # fmt: skip


def known_suites(data: Path | None = None) -> dict[str, Callable[[], EvalTask]]:
    """All suites there are: ours, those of other packages (plumbline/extensions.py), and the public ones found in `data`."""
    others = {name: entry.load() for name, entry in added("plumbline.suites", SUITES).items()}
    return SUITES | others | (public.found_in(data) if data else {})


def load_suites(names: Sequence[str], *, data: Path | None = None, limit: int | None = None) -> list[EvalTask]:
    """The suites named, with those they need beside them; "all" is every one that can be had.

    data: a folder laid out as <set>/<file>.jsonl.gz, which adds the public sets found in it.
    Raises ValueError for a name that does not exist, with what there is.
    """
    known = known_suites(data)
    wanted = list(dict.fromkeys(known if "all" in names else names))
    for name in wanted:
        if name not in known:
            where = "; it reads public data: give its folder with --data DIR" if name in public.LOADERS else ""
            raise ValueError(f"no suite {name!r}{where or '; there are ' + ', '.join(known)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: needs at least 1 sample a suite, or nothing for all")
    tasks = [known[name]() for name in wanted]
    beside = [need for task in tasks for need in task.needs if need not in wanted]
    tasks += [known[need]() for need in dict.fromkeys(beside)]
    return [task.first(limit) for task in tasks]
