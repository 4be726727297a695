"""The rollout engine: answers to many prompts at once, with the log-probability of every token drawn.

Llama-like models and the Mixture-of-Experts policy run on `plumbline.policy_models.rollout.decoder`: finished rows leave the batch and
waiting prompts take their places. Every other causal language model runs through its own `forward`, slower and with
the same result.

Sampling is from the whole softmax at one temperature, so that a log-probability of the policy is the log-probability
of the sample. Every prompt has its own stream of random numbers, so that an answer does not depend on what else is in
the batch, up to rounding.

N prompts, M new tokens at most, B rows of the batch, P prompt positions, V vocabulary.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from plumbline.policy_models.rollout.decoder import Decoder, compute_dtype, supports_fast_path

logger = logging.getLogger(__name__)
_told: set[str] = set()  # reasons for the slow path that were logged

# Finished rows are replaced or leave once they are this share of the batch.
_LEAVE_SHARE = 1 / 8
_LEAVE_SHARE_SLOW = 1 / 4  # with a growing cache each time costs a copy of all of it
_SAMPLE_LOGITS = 2**18  # logits that sampling on a CPU passes over at a time: they stay in its cache between the passes


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One sampled answer.

    ids        its tokens, up to and including the stop token if there was one
    logp       natural log-probability of each, under the sampling temperature (at temperature 0: under temperature 1)
    finished   True when a stop token ended it, False when it ran into the limit
    """

    ids: list[int]
    logp: list[float]
    finished: bool


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """A row of the batch before its next token: `row` is the place of its prompt in the list given to `generate`."""

    row: int
    prompt: Sequence[int]
    answer: Sequence[int]


# (rows, logits (B, V)) -> logits (B, V). Each row's result depends on that row alone; -inf forbids a token.
Processor = Callable[[Sequence[DecodeRow], Tensor], Tensor]


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    processors: Sequence[Processor] = (),
) -> list[Answer]:
    """Samples one answer a prompt; temperature 0 takes the likeliest token. Answers come in the order of the prompts.

    Args:
        model: any causal language model, with or without PEFT adapters, which act as they are set just now.
        pad_id: fills the left of short prompts where the model's own `forward` is used; no result depends on it.
        generator: seeds all draws; its device is free. None takes torch's global one.
        batch_size: rows that decode together, which bounds the cache.
        dtype: type to compute in. None: the autocast type where autocast is on, else that of the weights.
        processors: change the logits before each draw, in this order (`plumbline.safety.constrained` has some); log-probabilities
            are then those of the changed distribution. Each step waits for the tokens of the one before.

    Raises:
        ValueError: for an empty prompt, no stop ids, a temperature below 0, or sizes below 1.
        RuntimeError: when the processors leave a row no token to draw.
        FloatingPointError: when a log-probability of a drawn token is NaN or infinite.
    """
    if not stop_ids:
        raise ValueError("stop_ids is empty: give the ids that end an answer, such as the tokenizer's eos_token_id")
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: must be at least 0 (0 takes the likeliest token)")
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"{max_new_tokens=} and {batch_size=} must be at least 1")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {row} has no tokens; apply the chat template first, or drop it")
    if not prompts:
        return []

    answers = _Answers(prompts, max_new_tokens, stop_ids, temperature, generator, model.device, processors)
    reason = supports_fast_path(model, max(map(len, prompts)) + max_new_tokens)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            if reason is None:
                _generate_fast(model, prompts, answers, batch_size, dtype or compute_dtype(model))
            else:
                _tell_once(f"generating through {type(model).__name__}.forward, which is slower: {reason}")
                autocast = torch.autocast(model.device.type, dtype=dtype) if dtype else nullcontext()
                with autocast:
                    for batch in _batches_by_length(prompts, batch_size):
                        _generate_slow(model, prompts, batch, answers, pad_id)
    finally:
        model.train(was_training)
    return answers.to_list()


class _Answers:
    """What has been drawn so far, by prompt. Row N is a bin for the tokens of rows that no prompt owns any more."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        temperature: float,
        generator: torch.Generator | None,
        device: torch.device,
        processors: Sequence[Processor],
    ) -> None:
        self.prompts, self.processors = prompts, processors
        num_prompts = len(prompts)
        shape = (num_prompts + 1, max_new_tokens)
        self.bin = num_prompts
        self.ids_NM = torch.zeros(shape, dtype=torch.long, device=device)
        self.logp_NM = torch.zeros(shape, device=device)
        self.length_N = torch.zeros(num_prompts + 1, dtype=torch.long, device=device)
        self.finished_N = torch.zeros(num_prompts + 1, dtype=torch.bool, device=device)
        self.stop = torch.tensor(sorted(set(stop_ids)), device=device)
        self.temperature = temperature
        if temperature:  # drawn up front: a prompt's numbers depend on its place in the list alone
            draws_on = device if generator is None else generator.device
            uniform_NM = torch.rand(num_prompts, max_new_tokens, generator=generator, device=draws_on).to(device)
        else:
            uniform_NM = torch.zeros(num_prompts, max_new_tokens, device=device)
        self.uniform_NM = torch.cat([uniform_NM, uniform_NM[:1]])

    def draw(self, logits_BV: Tensor, prompt_B: Tensor) -> tuple[Tensor, Tensor]:
        """Draws, records and returns the next token (B,) of each prompt, and whether (B,) that ended its answer."""
        step_B = self.length_N[prompt_B]
        if self.processors:
            logits_BV = self.process(logits_BV, prompt_B)
        token_B, logp_B = sample(logits_BV, self.temperature, self.uniform_NM[prompt_B, step_B])
        stopped_B = torch.isin(token_B, self.stop)
        self.ids_NM[prompt_B, step_B] = token_B
        self.logp_NM[prompt_B, step_B] = logp_B
        self.finished_N[prompt_B] = stopped_B
        self.length_N[prompt_B] = step_B + 1
        self.length_N[self.bin] = 0
        return token_B, stopped_B | (step_B + 1 == self.ids_NM.shape[1])

    def process(self, logits_BV: Tensor, prompt_B: Tensor) -> Tensor:
        """The logits after all processors; rows without an owner are left as they are."""
        owners, lengths = prompt_B.tolist(), self.length_N[prompt_B].tolist()
        ids = self.ids_NM[prompt_B, : max(lengths) + 1].tolist()
        at = [place for place, owner in enumerate(owners) if owner != self.bin]
        rows = [DecodeRow(owners[i], self.prompts[owners[i]], ids[i][: lengths[i]]) for i in at]
        changed = logits_BV[at]
        for processor in self.processors:
            changed = processor(rows, changed)
        stuck = (changed == -math.inf).all(-1).nonzero()[:, 0].tolist()
        if stuck:
            raise RuntimeError(
                f"the processors left prompt {rows[stuck[0]].row} no token to draw after "
                f"{len(rows[stuck[0]].answer)} tokens: two constraints that exclude each other?"
            )
        return logits_BV.index_copy(0, torch.tensor(at, device=logits_BV.device), changed.to(logits_BV.dtype))

    def to_list(self) -> list[Answer]:
        lengths, finished = self.length_N.tolist(), self.finished_N.tolist()
        if not self.logp_NM.isfinite().all():
            raise FloatingPointError(
                "the logits are not finite: the weights hold NaN or infinity, or their type overflows; "
                "look at the checkpoint, or compute in float32"
            )
        ids, logps = self.ids_NM.tolist(), self.logp_NM.tolist()
        return [
            Answer(ids=ids[row][: lengths[row]], logp=logps[row][: lengths[row]], finished=finished[row])
            for row in range(self.bin)
        ]


def _generate_fast(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], answers: _Answers, batch_size: int, dtype: torch.dtype
) -> None:
    """Continuous batching. Longest prompts first: whoever enters later then fits before the column being written."""
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    num_rows = min(batch_size, len(prompts))
    max_new_tokens = answers.ids_NM.shape[1]
    decoder = Decoder(
        model,
        num_rows=num_rows,
        num_positions=len(prompts[waiting[0]]) + max_new_tokens,
        spare_columns=max(32, max_new_tokens // 2) if len(prompts) > num_rows else 0,
        dtype=dtype,
    )
    owner = [answers.bin] * num_rows  # which prompt has each row of the batch
    token_B = torch.zeros(num_rows, dtype=torch.long, device=decoder.device)
    owner_B = torch.full_like(token_B, answers.bin)

    while True:
        # 1. Rows without an owner take in waiting prompts, or leave once there are enough of them.
        free = [row for row, prompt in enumerate(owner) if prompt == answers.bin]
        if len(free) == len(owner) and not waiting:
            return
        if len(free) >= min(len(owner) * _LEAVE_SHARE, len(waiting) or math.inf):
            if waiting:
                rows = free[: len(waiting)]
                entering, waiting = waiting[: len(rows)], waiting[len(rows) :]
                logits_BV = decoder.prefill([prompts[i] for i in entering], rows)
                index_B = torch.tensor(rows, device=decoder.device)
                owner_B[index_B] = torch.tensor(entering, device=decoder.device)
                for row, prompt in zip(rows, entering, strict=True):
                    owner[row] = prompt
                token_B[index_B], ended_B = answers.draw(logits_BV, owner_B[index_B])
                over = [row for row, ended in zip(rows, ended_B.tolist(), strict=True) if ended]
            else:
                origin = decoder.keep([row for row, prompt in enumerate(owner) if prompt != answers.bin])
                owner = [owner[row] for row in origin]
                token_B, owner_B = token_B[origin], owner_B[origin]
                over = []
        # 2. Else every row goes one token further.
        else:
            token_B, ended_B = answers.draw(decoder.step(token_B), owner_B)
            over = [r for r in ended_B.nonzero()[:, 0].tolist() if owner[r] != answers.bin] if ended_B.any() else []
        # 3. Rows whose answer has ended lose their owner.
        if over:
            decoder.release(over)
            owner_B[over] = answers.bin
            for row in over:
                owner[row] = answers.bin


def _generate_slow(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], batch: Sequence[int], answers: _Answers, pad_id: int
) -> None:
    """One batch of prompts, left-padded, through `model.forward` with a growing cache."""
    device = model.device
    width = max(len(prompts[i]) for i in batch)
    ids_BP = torch.full((len(batch), width), pad_id, device=device)
    keep_BP = torch.zeros_like(ids_BP)
    for row, i in enumerate(batch):
        ids_BP[row, width - len(prompts[i]) :] = torch.tensor(list(prompts[i]), device=device)
        keep_BP[row, width - len(prompts[i]) :] = 1

    owner_B = torch.tensor(list(batch), device=device)
    cache = DynamicCache(config=model.config)
    next_ids, position = ids_BP, keep_BP.cumsum(1) - keep_BP
    last = torch.tensor([-1], device=device)  # an index, since of a slice (B, 1, D) torch copies the head once a row
    while True:
        logits_BV = model(
            input_ids=next_ids,
            attention_mask=keep_BP,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last,
        ).logits[:, -1]
        token_B, ended_B = answers.draw(logits_BV, owner_B)
        owner_B = owner_B.masked_fill(ended_B, answers.bin)
        position = position[:, -1:] + 1
        keep_BP = torch.cat([keep_BP, torch.ones_like(keep_BP[:, :1])], dim=1)
        stay = (owner_B != answers.bin).nonzero()[:, 0]
        if len(stay) == 0:
            return
        if len(stay) <= len(owner_B) * (1 - _LEAVE_SHARE_SLOW):
            cache.batch_select_indices(stay)
            owner_B, token_B, position, keep_BP = owner_B[stay], token_B[stay], position[stay], keep_BP[stay]
        next_ids = token_B[:, None]


def _batches_by_length(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _tell_once(text: str) -> None:
    if text not in _told:
        _told.add(text)
        logger.warning(text)


def sample(logits_BV: Tensor, temperature: float, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row from softmax(logits / temperature), and its log-probability in fp32; both (B,).

    Inverts the cumulative sum with one uniform number in [0, 1) a row, where `torch.multinomial` draws one a word: a
    fifth of a decode step at a vocabulary of 49,152. Temperature 0 takes the likeliest word. A word of logit -inf is
    never drawn.
    """
    if logits_BV.device.type != "cpu":
        return _sample_rows(logits_BV, temperature, uniform_B)
    rows = max(1, _SAMPLE_LOGITS // logits_BV.shape[1])
    parts = [
        _sample_rows(logits, temperature, uniform)
        for logits, uniform in zip(logits_BV.split(rows), uniform_B.split(rows), strict=True)
    ]
    return torch.cat([token for token, _ in parts]), torch.cat([logp for _, logp in parts])


def _sample_rows(logits_BV: Tensor, temperature: float, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    logits_BV = logits_BV.float()
    top_B1 = logits_BV.amax(dim=-1, keepdim=True)
    weight_BV = logits_BV - top_B1
    if temperature not in (0, 1):
        weight_BV /= temperature
    # Two levels, blocks of words and words of a block: one cumulative sum over all words is three times slower.
    num_blocks, width = _factors(logits_BV.shape[-1])
    weight_BKW = weight_BV.exp_().view(-1, num_blocks, width)
    cumulative_BK = weight_BKW.sum(-1).cumsum_(-1)
    total_B1 = cumulative_BK[:, -1:]
    if temperature == 0:
        token_B1 = logits_BV.argmax(dim=-1, keepdim=True)
    else:
        # below 1 by more than rounding, so that scaled by a sum it stays below that sum, and the draw has weight
        uniform_B1 = uniform_B[:, None].float().clamp(max=1 - 2**-23)
        target_B1 = uniform_B1 * total_B1
        # a search among NaN ends past the last place; the log-probability then is NaN and says so
        block_B1 = torch.searchsorted(cumulative_BK, target_B1, right=True).clamp_(max=num_blocks - 1)
        before_B1 = torch.where(block_B1 > 0, cumulative_BK.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
        inside_BW = weight_BKW[torch.arange(len(block_B1), device=block_B1.device), block_B1[:, 0]].cumsum(-1)
        share_B1 = (target_B1 - before_B1) / (cumulative_BK.gather(1, block_B1) - before_B1)
        inside_B1 = share_B1.clamp_(0, 1 - 2**-23) * inside_BW[:, -1:]
        word_B1 = torch.searchsorted(inside_BW, inside_B1, right=True).clamp_(max=width - 1)
        token_B1 = block_B1 * width + word_B1
    logp_B1 = (logits_BV.gather(1, token_B1) - top_B1) / (temperature or 1.0) - total_B1.log()
    return token_B1[:, 0], logp_B1[:, 0]


def _factors(number: int) -> tuple[int, int]:
    """The most even split of a number into two factors, the larger first."""
    small = next(n for n in range(math.isqrt(number), 0, -1) if number % n == 0)
    return number // small, small
