"""TRL's RewardTrainer with soft labels, and without the work that padding and repeated prompts cost.

What is added to Bradley-Terry (Ouyang et al. 2022, eq. 1): `p_chosen`, the share of people who preferred the chosen
answer (0.5: a tie), label smoothing, and the cost loss of Safe RLHF (Dai et al. 2023, eq. 6).

What is saved:
- pairs of like length share a batch, and widths are rounded up, so that few shapes occur (a CPU compiles a kernel for
  each new one);
- both answers of a pair stand in one row behind one copy of what they have in common, [prompt, chosen, rejected],
  with positions that start again and a mask that hides the chosen answer from the rejected one: scores equal those of
  two rows, and the prompt is computed once;
- only the two last tokens of a row reach the scalar head.

The number of pairs a batch stays `per_device_train_batch_size`, as in TRL: with a token budget instead, pairs of long
batches would weigh more than others.

B pairs, S positions, D width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Sampler
from trl import RewardTrainer

from plumbline.align.data.mixture import DomainMixture
from plumbline.policy_models.attention import PACKED

OPTIONAL = ("margin", "p_chosen", "chosen_harm", "rejected_harm", "domain")  # columns of numbers a dataset may have
SHARED_BACKBONES = {"LlamaModel", "MistralModel", "MoEPolicyModel", "Qwen2Model", "Qwen3Model"}
MASKED_ATTENTION = {"sdpa", PACKED}  # take a ready 4-D bool mask; eager attention would add it to the scores
MEGABATCH = 32  # batches that are shuffled together before they are sorted by length


def preference_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    *,
    margin_B: Tensor | float = 0.0,
    p_chosen_B: Tensor | float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean of -p log s(d - m) - (1 - p) log s(-d - m), with d = chosen - rejected and s the logistic function.

    With p = 1 and m = 0, Bradley-Terry. Smoothing moves p towards 0.5: p (1 - 2 e) + e, as if labels were flipped with
    probability e (arXiv:2305.18290, cDPO).
    """
    gap_B = chosen_B - rejected_B
    p_B = torch.as_tensor(p_chosen_B, dtype=gap_B.dtype, device=gap_B.device)
    p_B = p_B * (1 - 2 * label_smoothing) + label_smoothing
    return -(p_B * F.logsigmoid(gap_B - margin_B) + (1 - p_B) * F.logsigmoid(-gap_B - margin_B)).mean()


def harm_sign_loss(chosen_B: Tensor, rejected_B: Tensor, chosen_harm_B: Tensor, rejected_harm_B: Tensor) -> Tensor:
    """Mean of -log s(h * cost) over answers that people called harmful (h = 1) or harmless (h = -1); h = 0: not said.

    It puts the zero of the cost between the two, so that "expected cost at most 0" means something to a constraint.
    """
    cost_N, harm_N = torch.cat([chosen_B, rejected_B]), torch.cat([chosen_harm_B, rejected_harm_B])
    said_N = (harm_N != 0).to(cost_N.dtype)
    return -(F.logsigmoid(harm_N * cost_N) * said_N).sum() / said_N.sum().clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class PairCollator:
    """Examples with `chosen_ids` and `rejected_ids` to one batch of rows [common start, chosen, rejected].

    Gives input_ids, position_ids (B, S), attention_mask (B, 1, S, S) bool, last (B, 2): the positions of the two last
    tokens, tokens: how many the two conversations of all pairs have. Or, with `shared` false, what TRL's collator
    gives: rows of chosen, then rows of rejected answers, and a 2-D mask.
    """

    pad_id: int
    shared: bool
    multiple: int = 32

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        pairs = [(example["chosen_ids"], example["rejected_ids"]) for example in examples]
        batch = self._one_row(pairs) if self.shared else self._two_rows(pairs)
        batch["tokens"] = torch.tensor(sum(len(a) + len(b) for a, b in pairs))
        for name in OPTIONAL:
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float32)
        return batch

    def _one_row(self, pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        starts = [common_start(a, b) for a, b in pairs]
        width = self._width(len(a) + len(b) - start for (a, b), start in zip(pairs, starts, strict=True))
        input_BS = torch.full((len(pairs), width), self.pad_id)
        position_BS = torch.zeros_like(input_BS)
        see_BSS = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(pairs), 1, 1)
        last_B2 = torch.zeros(len(pairs), 2, dtype=torch.long)
        for row, ((chosen, rejected), start) in enumerate(zip(pairs, starts, strict=True)):
            turn, end = len(chosen), len(chosen) + len(rejected) - start
            input_BS[row, :end] = torch.tensor([*chosen, *rejected[start:]])
            position_BS[row, :turn] = torch.arange(turn)
            position_BS[row, turn:end] = torch.arange(start, len(rejected))
            see_BSS[row, turn:, start:turn] = False
            last_B2[row] = torch.tensor([turn - 1, end - 1])
        return {
            "input_ids": input_BS,
            "position_ids": position_BS,
            "attention_mask": see_BSS[:, None],
            "last": last_B2,
        }

    def _two_rows(self, pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        rows = [a for a, _ in pairs] + [b for _, b in pairs]
        width = self._width(len(ids) for ids in rows)
        input_BS = torch.full((len(rows), width), self.pad_id)
        keep_BS = torch.zeros_like(input_BS)
        for row, ids in enumerate(rows):
            input_BS[row, : len(ids)] = torch.tensor(ids)
            keep_BS[row, : len(ids)] = 1
        return {"input_ids": input_BS, "attention_mask": keep_BS}

    def _width(self, lengths: Any) -> int:
        return -(-max(lengths) // self.multiple) * self.multiple


def common_start(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """Tokens that both start with; at least one of each is left over, for its score to be read at."""
    limit = min(len(chosen), len(rejected)) - 1
    return next((at for at in range(limit) if chosen[at] != rejected[at]), limit)


class LikeLengths(Sampler[int]):
    """Rows in random order such that runs of `batch_size` have like lengths; runs come in random order too.

    With a `mixture`, rows are drawn by its shares of the moment, as many as there are, some of them more than once.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, mixture: DomainMixture | None = None
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0
        self.mixture = mixture

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Another order each epoch, the same one after a resume."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = torch.Generator().manual_seed(self.seed + 7919 * self.epoch)
        if self.mixture is not None:
            yield from self._mixed(self.mixture, rng)
            return
        order = torch.randperm(len(self.lengths), generator=rng).tolist()
        size = self.batch_size * MEGABATCH
        batches = []
        for start in range(0, len(order), size):
            rows = sorted(order[start : start + size], key=lambda row: self.lengths[row])
            batches += [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
        short = [batch for batch in batches if len(batch) < self.batch_size]  # last: batches are cut by count
        full = [batch for batch in batches if len(batch) == self.batch_size]
        for at in torch.randperm(len(full), generator=rng).tolist():
            yield from full[at]
        for batch in short:
            yield from batch

    def _mixed(self, mixture: DomainMixture, rng: torch.Generator) -> Iterator[int]:
        """The mixture moves between draws, so they are small: 4 batches, sorted by length."""
        for start in range(0, len(self.lengths), 4 * self.batch_size):
            rows = mixture.draw(min(4 * self.batch_size, len(self.lengths) - start), rng)
            yield from sorted(rows, key=lambda row: self.lengths[row])


class PairTrainer(RewardTrainer):
    """See the module's docstring. Takes a tokenised dataset (`chosen_ids`, `rejected_ids`, and any of OPTIONAL).

    Args:
        label_smoothing: in [0, 0.5).
        mixture: which rows come next; the dataset then has a column `domain`. Its shares are not saved in checkpoints.
        others: as for RewardTrainer.
    """

    def __init__(self, *, label_smoothing: float = 0.0, mixture: DomainMixture | None = None, **others: Any) -> None:
        super().__init__(**others)
        self.mixture = mixture
        self.preference_smoothing = label_smoothing
        self.shared = self.accelerator.num_processes == 1 and shares_rows(self._inner())
        pad_id = self._padding(others["processing_class"].pad_token_id)
        asked = self.args.pad_to_multiple_of  # type: ignore[attr-defined]
        multiple = asked if isinstance(asked, int) else 32 if self.args.device.type == "cpu" else 8
        self.data_collator = PairCollator(pad_id=pad_id, shared=self.shared, multiple=multiple)  # type: ignore[assignment]

    def _padding(self, pad_id: int) -> int:
        """The id that pads: another one while rows end with the tokenizer's, since the model looks for the last that is not it."""
        rows: Any = self.train_dataset
        ends = {ids[-1] for name in ("chosen_ids", "rejected_ids") for ids in rows[name]}
        if pad_id in ends:
            pad_id = next(token for token in range(len(ends) + 1) if token not in ends)
        self._inner().config.get_text_config().pad_token_id = pad_id
        return pad_id

    def _inner(self) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns: Any = ["chosen_ids", "rejected_ids", *OPTIONAL]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(a) + len(b) for a, b in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)]
        size = self.args.train_batch_size * self.accelerator.num_processes
        return LikeLengths(lengths, size, self.args.seed, self.mixture)

    def scores(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(scores of the chosen answers, of the rejected ones), (B,) each, fp32."""
        if not self.shared:
            logits = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).logits
            chosen_B, rejected_B = logits[:, 0].float().chunk(2)
            return chosen_B, rejected_B
        with self.accelerator.autocast():
            scores_B2 = shared_row_scores(self._inner(), inputs)
        return scores_B2[:, 0], scores_B2[:, 1]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        mode = "train" if self.model.training else "eval"  # type: ignore[union-attr]
        chosen_B, rejected_B = self.scores(model, inputs)
        loss = preference_loss(
            chosen_B,
            rejected_B,
            margin_B=inputs.get("margin", 0.0),
            p_chosen_B=inputs.get("p_chosen", 1.0),
            label_smoothing=self.preference_smoothing,
        )
        if "chosen_harm" in inputs:
            loss = loss + harm_sign_loss(chosen_B, rejected_B, inputs["chosen_harm"], inputs["rejected_harm"])
        centring = self.args.center_rewards_coefficient  # type: ignore[attr-defined]
        if centring is not None:
            loss = loss + centring * ((chosen_B + rejected_B) ** 2).mean()

        with torch.no_grad():
            if mode == "train":
                self._total_train_tokens += int(self.accelerator.gather(inputs["tokens"]).sum())
            scores_N = self.accelerator.gather(torch.cat([chosen_B, rejected_B]).detach())
            gap_B = self.accelerator.gather((chosen_B - rejected_B).detach())
            metrics = self._metrics[mode]
            metrics["num_tokens"] = [self._total_train_tokens]
            metrics["min_reward"].append(scores_N.min().item())
            metrics["mean_reward"].append(scores_N.mean().item())
            metrics["max_reward"].append(scores_N.max().item())
            metrics["accuracy"].append((gap_B > 0).float().mean().item())
            metrics["margin"].append(gap_B.mean().item())
            if self.mixture is not None and mode == "train":
                domain_N, loss_N = self.accelerator.gather((inputs["domain"], -F.logsigmoid(chosen_B - rejected_B)))
                self.mixture.observe(domain_N.cpu(), loss_N.detach().float().cpu())
                for name, share in self.mixture.shares.items():
                    metrics[f"mixture/{name}"].append(share)
        return (loss, {"logits": torch.stack([chosen_B, rejected_B], dim=1)}) if return_outputs else loss


def shared_row_scores(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(B, 2) fp32 scores of chosen and rejected answers that stand in one row; see `PairCollator`."""
    names = ("input_ids", "position_ids", "attention_mask")
    states_BSD = model.base_model(use_cache=False, **{name: inputs[name] for name in names}).last_hidden_state
    rows_B1 = torch.arange(len(states_BSD), device=states_BSD.device)[:, None]
    return model.score(states_BSD[rows_B1, inputs["last"]])[..., 0].float()


def shares_rows(model: Any) -> bool:
    """Whether the model takes the mask of a shared row: known backbones, no sliding window, no flash attention."""
    config = model.config
    return (
        type(model.base_model).__name__ in SHARED_BACKBONES
        and config._attn_implementation in MASKED_ATTENTION
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and getattr(config, "sliding_window", None) is None
    )
