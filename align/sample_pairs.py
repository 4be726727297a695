"""Preference pairs from a model's own answers: which of two it should give is said by the kind of the prompt and by the reward.

Launch: `accelerate launch align/sample_pairs.py --config configs/ppo/debug.yaml --answers_per_prompt 2`

What DPO needs to be a baseline for PPO: trained on pairs that people wrote, it optimises their taste; on these it
optimises the very reward that PPO is given, offline (Dong et al. 2024, arXiv:2405.07863, one iteration). It reads the
settings of a PPO run, so that model, prompts, sampling and reward are the same.

Of each prompt come at most two pairs. Where its row says a kind:
behaviour   harmful: a decline over an answer that complies; twin or ordinary: an answer over a decline. Both sides are
            drawn from the model where it offers both, and the best declining and the best complying one are taken. Where
            it offers one behaviour alone, the other is made: the model is held to its own opening of a decline, or
            kept from it (`safety/constrained/openings.py`), and what it then says counts if it does behave so. Harmful prompts
            and twins only; ordinary prompts get such a pair where the model declined one by itself.
quality     the best over the worst, by the reward, of the answers with the right behaviour
A prompt without a kind gets the pair by quality, of all its answers. `declines` is the head of the safety part, which
the grader of evaluations shares nothing with.

What the run leaves:
`pairs.jsonl`     prompt, chosen, rejected, margin (difference of the rewards), kind, by (behaviour or quality), made
`scaling.json`    scaling of the reward parts, fitted on all drawn answers: hand it to PPO as `reward_scaling`
`report.json`     how many pairs each kind gave, how many sides were made, the opening
"""

import json
import re
import sys
from pathlib import Path

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from plumbline.align.data.rows import Messages, last_user_text
from plumbline.align.models.start import load_start
from plumbline.align.rl.inputs import build_reward, kinds_of, read_prompt_files, rows_of_step
from plumbline.align.rl.rollouts import encode_fitting
from plumbline.align.rl.settings import PPOSettings
from plumbline.align.runtime.launch import claim_run, launched, open_run, parse_settings, pick_dtype
from plumbline.align.runtime.tracking import write_rows
from plumbline.policy_models.chat import stop_ids
from plumbline.policy_models.devices import default_device
from plumbline.policy_models.loading import load_tokenizer, resolve_model_source
from plumbline.policy_models.rollout.generation import generate
from plumbline.reward import CompositeReward
from plumbline.rows import is_sound
from plumbline.safety.constrained.openings import Openings
from plumbline.safety.verifier.refusal import load_refusal_head


@dataclass(kw_only=True)
class PairSettings(PPOSettings):
    """A PPO run's settings; of them count model, prompts, sampling, reward, scaling and seed. And:"""

    answers_per_prompt: int = field(default=4, metadata={"help": "answers to each prompt, at least 2"})
    pair_prompts: int = field(default=64, metadata={"help": "prompts, drawn from prompts_file"})
    min_margin: float = field(default=0.5, metadata={"help": "smaller differences of reward make no pair"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answers_per_prompt < 2:
            raise ValueError(f"answers_per_prompt={self.answers_per_prompt}: must be at least 2 to make a pair")
        if self.pair_prompts < 1:
            raise ValueError(f"pair_prompts={self.pair_prompts}: must be at least 1")
        if not self.min_margin >= 0:
            raise ValueError(f"min_margin={self.min_margin}: must be at least 0")
        if self.shares_reward_model:
            raise ValueError(f"reward_model={self.reward_model}: an adapter; name the merged folder of the same run")


Declines = Callable[[Sequence[str], Sequence[str]], Sequence[float]]  # P(the answer declines), one a row
RIGHT = {"harmful": True, "twin": False, "ordinary": False}  # whether a prompt of this kind is to be declined


@dataclass(kw_only=True)
class Candidate:
    """One answer to one prompt: whether it declines, its reward (None: no opinion), whether it was drawn under a guide."""

    text: str
    declines: bool
    total: float | None
    made: bool = False


def sample_pairs(
    settings: PairSettings, *, reward: CompositeReward | None = None, declined: Declines | None = None
) -> Path:
    """Samples, scores, pairs and returns the run folder. `reward` and `declined` replace those that ship."""
    everything, _ = read_prompt_files(settings)
    for source in (settings.model, settings.reward_model if settings.preference_weight else None):
        if source:
            resolve_model_source(source)
    state = PartialState(cpu=default_device().type == "cpu")  # once: later calls share what this one found
    lock = claim_run(settings.output_dir)
    run = open_run(settings.output_dir, settings) if state.is_main_process else Path(settings.output_dir)
    tokenizer = load_tokenizer(settings.model)
    prompts, ids = encode_fitting(tokenizer, everything, settings.max_prompt_tokens, what="sample_pairs")
    kinds = kinds_of(settings, everything, prompts)
    count = min(settings.pair_prompts, len(prompts))
    order = rows_of_step(kinds, 0, count, seed=settings.seed, shares=settings.kind_shares)
    chosen = list(dict.fromkeys(order))  # a kind with fewer prompts than its share gives each once
    mine = chosen[state.process_index :: state.num_processes]
    model: Any = load_start(settings.model, dtype=pick_dtype(settings.dtype))
    model.to(default_device())
    reward = reward or build_reward(settings)
    declined = declined or load_refusal_head().at_once
    asking = _Asking(model, tokenizer, settings, reward, declined)

    rows = [row for row in mine for _ in range(settings.answers_per_prompt)]
    answers, finished, drawn = asking.answers([ids[row] for row in rows], [prompts[row] for row in rows], draw=0)
    everyone: list[Any] = gather_object([drawn]) if state.num_processes > 1 else [drawn]
    raw = {name: [score for part in everyone for score in part[name]] for name in drawn}
    scaling = reward.fit_raw(raw)
    totals = asking.totals(drawn, finished)
    asked = [last_user_text(prompts[row]) for row in rows]
    likely = declined(asked, answers) if rows else []
    of_prompt: dict[int, list[Candidate]] = {row: [] for row in mine}
    for row, text, p, total in zip(rows, answers, likely, totals, strict=True):
        of_prompt[row].append(Candidate(text=text, declines=p > 0.5, total=total))

    openings = [openings_of(c.text for row in mine if kinds[row] == "harmful" for c in of_prompt[row] if c.declines)]
    gathered: list[Counter[str]] = gather_object(openings) if state.num_processes > 1 else openings
    seen: Counter[str] = sum(gathered, Counter())
    opening = max(sorted(seen), key=lambda text: seen[text]) if seen else None
    if opening is not None:
        asking.make_missing({row: of_prompt[row] for row in mine if kinds[row] in ("harmful", "twin")},
                            {row: bool(RIGHT.get(kinds[row] or "")) for row in mine}, prompts, ids, opening)  # fmt: skip
    pairs = [
        pair | {"prompt": prompts[row], "kind": kinds[row] or ""}
        for row in mine
        for pair in pairs_of(of_prompt[row], kinds[row], settings)
    ]
    pairs = gather_object(pairs) if state.num_processes > 1 else pairs
    if not pairs:
        raise ValueError(
            f"no prompt has two answers whose rewards differ by min_margin={settings.min_margin}; "
            "lower it, raise answers_per_prompt or the temperature"
        )
    if state.is_main_process:
        scaling.save(run / "scaling.json")
        write_rows(run / "pairs.jsonl", pairs)
        report = {"prompts": len(chosen), "opening": opening, "pairs": count_pairs(pairs)}
        (run / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    state.wait_for_everyone()
    if lock is not None:
        lock.close()
    return run


@dataclass(frozen=True)
class _Asking:
    """Draws answers of one model and scores them."""

    model: Any
    tokenizer: Any
    settings: PairSettings
    reward: CompositeReward
    declined: Declines

    def answers(
        self, ids: Sequence[list[int]], asked: Sequence[Messages], *, draw: int, guide: Openings | None = None
    ) -> tuple[list[str], list[bool], dict[str, list[float | None]]]:
        """(texts, whether each ended by itself, raw scores by part). `draw` tells the random numbers of one call from those of another."""
        s = self.settings
        seed = s.seed + 100_003 * PartialState().process_index + 1_009 * draw
        found = generate(
            self.model,
            ids,
            max_new_tokens=s.max_new_tokens,
            stop_ids=stop_ids(self.model, self.tokenizer),
            pad_id=self.tokenizer.pad_token_id,
            temperature=s.temperature,
            generator=torch.Generator(self.model.device).manual_seed(seed),
            processors=[guide] if guide else [],
        )
        texts = self.tokenizer.batch_decode([a.ids for a in found], skip_special_tokens=True)
        return texts, [a.finished for a in found], self.reward.raw(list(asked), texts)

    def totals(self, raw: dict[str, list[float | None]], finished: Sequence[bool]) -> list[float | None]:
        """Rewards, with PPO's charge for an answer that did not end."""
        charge = self.settings.missing_eos_penalty
        return [
            None if total is None else total - charge * (not ended)
            for total, ended in zip(self.reward.combine(raw).total, finished, strict=True)
        ]

    def make_missing(
        self,
        of_prompt: dict[int, list[Candidate]],
        right: dict[int, bool],
        prompts: Sequence[Messages],
        ids: Sequence[list[int]],
        opening: str,
    ) -> None:
        """Adds an answer of the behaviour that a prompt's answers lack, where the guided model does show it."""
        wanted = [
            (row, not have[0].declines) for row, have in of_prompt.items() if len({c.declines for c in have}) == 1
        ]
        if not wanted:
            return
        tokens = self.tokenizer(opening, add_special_tokens=False)["input_ids"]
        guide = Openings(
            begin={at: tokens for at, (_, decline) in enumerate(wanted) if decline},
            avoid={at: tokens[:1] for at, (_, decline) in enumerate(wanted) if not decline},
        )
        texts, finished, raw = self.answers(
            [ids[row] for row, _ in wanted], [prompts[row] for row, _ in wanted], draw=1, guide=guide
        )
        asked = [last_user_text(prompts[row]) for row, _ in wanted]
        totals = self.totals(raw, finished)
        for (row, decline), text, p, total in zip(wanted, texts, self.declined(asked, texts), totals, strict=True):
            if (p > 0.5) == decline:
                of_prompt[row].append(Candidate(text=text, declines=decline, total=total, made=True))


def openings_of(answers: Iterable[str]) -> "Counter[str]":
    """First sentences, counted; an answer without the end of a sentence gives none."""
    firsts = (re.match(r"\s*(.+?[.!?])(?=\s|$)", answer) for answer in answers)
    return Counter(first.group(1) for first in firsts if first)


def pairs_of(candidates: Sequence[Candidate], kind: str | None, settings: PairSettings) -> list[dict[str, Any]]:
    """At most a pair by behaviour and a pair by quality.

    Blank answers, answers without a reward and answers that no reader of the pairs would take (a NUL) take no part.
    """
    known = [c for c in candidates if c.total is not None and c.text.strip() and is_sound(c.text)]

    def earned(candidate: Candidate) -> float:
        assert candidate.total is not None
        return candidate.total

    right = RIGHT.get(kind or "")
    good = [c for c in known if right is None or c.declines == right]
    bad = [c for c in known if right is not None and c.declines != right]
    pairs = []
    if good and bad:
        # the drawn before the made, the better before the worse: what it should say, and the likeliest slip
        best, slip = (min(side, key=lambda c: (c.made, -earned(c))) for side in (good, bad))
        pairs.append(_pair(best, slip, "behaviour"))
    drawn = [c for c in good if not c.made]
    if len(drawn) > 1:
        best, worst = max(drawn, key=earned), min(drawn, key=earned)
        if earned(best) - earned(worst) >= settings.min_margin and best.text.strip() != worst.text.strip():
            pairs.append(_pair(best, worst, "quality"))
    return pairs


def _pair(chosen: Candidate, rejected: Candidate, by: str) -> dict[str, Any]:
    assert chosen.total is not None and rejected.total is not None
    # by behaviour the chosen one may score lower, and a margin is not below 0
    return {
        "chosen": chosen.text,
        "rejected": rejected.text,
        "margin": max(chosen.total - rejected.total, 0.0),
        "by": by,
        "made": chosen.made or rejected.made,
    }


def count_pairs(pairs: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """By kind ("" where a prompt has none): pairs by behaviour, by quality, and how many have a made side."""
    counts: dict[str, dict[str, int]] = {}
    for pair in pairs:
        of_kind = counts.setdefault(pair["kind"], {"behaviour": 0, "quality": 0, "made": 0})
        of_kind[pair["by"]] += 1
        of_kind["made"] += pair["made"]
    return counts


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this stage."""
    (settings,) = parse_settings((PairSettings,), argv, stage="ppo")
    run = sample_pairs(settings)
    if PartialState().is_main_process:
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
        for kind, counts in report["pairs"].items():
            print(f"sample_pairs: {kind or 'no kind'}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
        total = sum(n["behaviour"] + n["quality"] for n in report["pairs"].values())
        print(f"sample_pairs: finished, {total} pairs of {report['prompts']} prompts in {run / 'pairs.jsonl'}")


if __name__ == "__main__":
    launched(main, "sample_pairs")
