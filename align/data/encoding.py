"""Conversations to the token ids that a stage trains on, and one line for everything that is lost on the way.

Nothing is cut or dropped without a word: rows that are too long, that the chat template refuses, or of which it leaves out
the tools or their calls, are left out and counted; a field that the template does not show (a name, a chain of thought)
is counted; when nothing is left, the error names the rule and what would keep the rows.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from plumbline.align.data.formats import PreferencePair
from plumbline.messages import Messages
from plumbline.policy_models.chat import TemplateRefusalError, check_template, encode, lost_in_template, takes_system

# A row without these says something else; without the others it says the same with less
ESSENTIAL = ("tools", "tool_calls")
IGNORED = -100  # the label that no loss looks at
_TAIL = 4  # tokens within which an answer ends: a template may put line feeds behind the end token


class Encoder:
    """Prompts and answers as ids, by the tokenizer's chat template; counts what it changes or leaves out.

    Args:
        what: the stage, for messages.
        end_ids: ids that end an answer. Where the template puts none of them, the tokenizer's end token is appended, so
            that a stop is learned. Empty: nothing is appended.
        max_length: tokens of prompt and answer together; None: any.
    """

    def __init__(
        self, what: str, tokenizer: Any, *, end_ids: Collection[int] = (), max_length: int | None = None
    ) -> None:
        check_template(tokenizer)
        self.what, self.tokenizer, self.end_ids, self.max_length = what, tokenizer, set(end_ids), max_length
        self.rows = 0
        self.too_long: list[int] = []  # lengths of rows that were left out
        self.cut = 0
        self._left_out: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()
        self._refusal = ""
        self._folded = self._appended = self._apart = 0
        self._takes_system = takes_system(tokenizer)

    def answers(
        self, prompt: Messages, answers: Sequence[Messages], tools: list[Any] | None
    ) -> tuple[list[int], list[list[int]]] | None:
        """(prompt ids, ids of each answer), of which prompt and answer together are the rendered conversation.

        None for a row that is left out; that it is too long is for the caller to see.
        """
        self.rows += 1
        try:
            lost = set().union(*(lost_in_template(self.tokenizer, [*prompt, *answer], tools) for answer in answers))
            if essential := [name for name in ESSENTIAL if name in lost]:
                self._left_out[f"the chat template does not show their {' and '.join(essential)}"] += 1
                return None
            asked = encode(self.tokenizer, prompt, tools=tools, open_turn=True)
            whole = [encode(self.tokenizer, [*prompt, *answer], tools=tools) for answer in answers]
        except TemplateRefusalError as refusal:
            self._refusal = self._refusal or str(refusal)
            self._left_out["the chat template refuses them"] += 1
            return None
        self._lost.update(lost)
        self._folded += prompt[0]["role"] == "system" and not self._takes_system
        # the answer begins where the prompt alone and the whole conversation part, which is not always after the prompt
        start = min(_common(asked, ids) for ids in whole)
        self._apart += start < len(asked)
        said = [ids[start:] for ids in whole]
        if self.end_ids and not all(self.end_ids & set(ids[-_TAIL:]) for ids in said):
            self._appended += 1
            said = [ids if self.end_ids & set(ids[-_TAIL:]) else [*ids, self.tokenizer.eos_token_id] for ids in said]
        return asked[:start], said

    def fits(self, length: int) -> bool:
        """Whether a row of so many tokens is kept; counts it where not."""
        if self.max_length is None or length <= self.max_length:
            return True
        self.too_long.append(length)
        return False

    def report(self, kept: int) -> None:
        """Prints what was lost; ValueError when nothing was kept."""
        rows, limit = self.rows, self.max_length
        reasons = [f"{count} because {why}" for why, count in self._left_out.items()]
        if self.too_long:
            reasons.append(f"{len(self.too_long)} longer than max_length={limit} tokens")
        refusal = f" ({self._refusal})" if self._refusal else ""
        if not kept:
            if len(self.too_long) == rows:
                raise ValueError(
                    f"all {rows} rows are longer than max_length={limit} tokens; raise it: the shortest has "
                    f"{min(self.too_long)}, {max(self.too_long)} would keep all"
                )
            raise ValueError(f"none of {rows} rows can be trained on: {'; '.join(reasons)}{refusal}")
        lines = []
        if reasons:
            longer = f"; max_length={max(self.too_long)} would keep all by length" if self.too_long else ""
            lines.append(f"{kept} of {rows} rows are kept; left out: {'; '.join(reasons)}{refusal}{longer}")
        if self.cut:
            lines.append(f"{self.cut} answers are cut at max_length={limit} tokens, and do not end")
        for name, count in self._lost.items():
            lines.append(f"{count} rows hold {name}, which the chat template does not show: trained without it")
        if self._folded:
            lines.append(
                f"the chat template takes no system role: in {self._folded} rows its text opens the user's first turn"
            )
        if self._appended:
            lines.append(
                f"the chat template puts no end token after {self._appended} of {rows} answers: "
                f"{self.tokenizer.eos_token!r} is appended, or the model could not learn to stop"
            )
        if self._apart:
            lines.append(
                f"in {self._apart} of {rows} rows the chat template writes a prompt otherwise once an answer follows; "
                "the answer is taken to begin where the two part"
            )
        for line in lines:
            print(f"{self.what}: {line}")


def check_lengths(stage: str, args: Any) -> None:
    """ValueError for settings of TRL's that would cut what is never cut here."""
    mode = getattr(args, "truncation_mode", "keep_start")
    if mode != "keep_start":
        raise ValueError(
            f"truncation_mode={mode!r}: {stage} cuts no prompt; rows longer than max_length are left out: drop the "
            "setting, or raise max_length"
        )


def sft_rows(
    rows: Sequence[dict[str, Any]],
    encoder: Encoder,
    *,
    cut_answers: bool = False,
    completion_only: bool = True,
    every_turn: bool = False,
) -> list[dict[str, list[int]]]:
    """{"input_ids", "labels"} of rows as `read_sft` gives them; labels are IGNORED where no loss is wanted.

    Args:
        cut_answers: answers are cut at max_length, and lose their end; else such rows are left out.
        completion_only: the loss is on the answers; else on prompts too.
        every_turn: the loss is on every turn of the assistant, for templates that mark them.
    """
    kept = []
    for row in rows:
        found = encoder.answers(row["prompt"], [row["completion"]], row.get("tools"))
        if found is None:
            continue
        prompt, (answer,) = found
        ids = [*prompt, *answer]
        labels = [*([IGNORED] * len(prompt) if completion_only else prompt), *answer]
        if every_turn:
            labels = _assistant_labels(encoder, row, ids)
        limit = encoder.max_length
        if cut_answers and limit is not None and len(prompt) < limit < len(ids):
            encoder.cut += 1
            ids, labels = ids[:limit], labels[:limit]
        if encoder.fits(len(ids)):
            kept.append({"input_ids": ids, "labels": labels})
    encoder.report(len(kept))
    return kept


def _assistant_labels(encoder: Encoder, row: dict[str, Any], ids: list[int]) -> list[int]:
    """The ids within the template's `generation` marks; what was appended to the template's text counts as well."""
    marked = encoder.tokenizer.apply_chat_template(
        [*row["prompt"], *row["completion"]],
        tools=row.get("tools"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    keep = [*marked["assistant_masks"], *[1] * (len(ids) - len(marked["assistant_masks"]))]
    if 1 not in marked["assistant_masks"]:
        raise ValueError(
            "assistant_only_loss=true needs a chat template that marks the assistant's turns with {% generation %}; "
            "this one does not: leave the setting out, and the loss is on the last turn"
        )
    return [token if said else IGNORED for token, said in zip(ids, keep, strict=True)]


def dpo_rows(pairs: Sequence[PreferencePair], encoder: Encoder) -> list[dict[str, list[int]]]:
    """{"prompt_ids", "chosen_ids", "rejected_ids"}; a pair is left out when either answer does not fit."""
    kept = []
    for pair in pairs:
        found = encoder.answers(pair.prompt, [pair.chosen, pair.rejected], pair.tools)
        if found is None:
            continue
        prompt, (chosen, rejected) = found
        if encoder.fits(len(prompt) + max(len(chosen), len(rejected))):
            kept.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    encoder.report(len(kept))
    return kept


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both start with."""
    both = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in both if a != b), min(len(first), len(second)))
