"""One answer, token by token as it is drawn, with the rollout engine's decoder."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from plumbline.policy_models.rollout.decoder import Decoder, compute_dtype, supports_fast_path
from plumbline.policy_models.rollout.generation import Processor, _Answers


def stream(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    processors: Sequence[Processor] = (),
) -> Iterator[int]:
    """The tokens of one answer as `generation.generate` would draw them, the stop token left out.

    The model is in evaluation mode from the first token until the iterator is used up or closed.

    Raises:
        ValueError: for an empty prompt, no stop ids, a temperature below 0 or no token to make.
    """
    if not prompt or not stop_ids or temperature < 0 or max_new_tokens < 1:
        raise ValueError(
            f"{len(prompt)} prompt tokens, {len(stop_ids)} stop ids, {temperature=}, {max_new_tokens=}: "
            "none may be empty, the temperature at least 0 and the limit at least 1"
        )
    answers = _Answers([prompt], max_new_tokens, stop_ids, temperature, generator, model.device, processors)
    owner = torch.zeros(1, dtype=torch.long, device=model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            logits_1V, step = _start(model, prompt, max_new_tokens)
        over = False
        while not over:
            with torch.inference_mode():  # not around the yield: what the caller does between tokens is its own
                token_B, over_B = answers.draw(logits_1V, owner)
                over = bool(over_B)
                if not over:
                    logits_1V = step(token_B)
            if not answers.finished_N[0]:
                yield int(token_B)
    finally:
        model.train(was_training)


def _start(
    model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Logits (1, V) after the prompt, and the function that gives those after one more token (1,)."""
    num_positions = len(prompt) + max_new_tokens
    if supports_fast_path(model, num_positions) is None:
        dtype = compute_dtype(model)
        decoder = Decoder(model, num_rows=1, num_positions=num_positions, spare_columns=0, dtype=dtype)
        return decoder.prefill([prompt], [0]), decoder.step
    cache = DynamicCache(config=model.config)

    def forward(ids_1S: Tensor) -> Tensor:
        return model(input_ids=ids_1S, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    return forward(torch.tensor([list(prompt)], device=model.device)), lambda token: forward(token[None])
