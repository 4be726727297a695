"""LearnedPreference: batches against single texts, scaling file, modes of a shared model, errors."""

import json

import pytest
import torch

from plumbline.policy_models.loading import load_scalar_model, load_tokenizer
from plumbline.reward.learned import SCALING_FILE, LearnedPreference, PreferenceEnsemble

PROMPTS = ["Why?", "Name a colour that is not green.", "Hello"]
ANSWERS = ["Because.", "Red.", "Hello to you, and to everybody who came along today."]
SOURCE = "bundled:tiny-moe"


@pytest.fixture(scope="module")
def scorer():
    return LearnedPreference(SOURCE, token_budget=64)


def test_scores_in_a_batch_equal_scores_alone(scorer):
    together = scorer(PROMPTS, ANSWERS)
    alone = [scorer([p], [a])[0] for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(set(together)) == 3
    assert scorer([], []) == []


def test_the_score_is_the_logit_at_the_end_of_the_conversation(scorer):
    text = [{"role": "user", "content": PROMPTS[1]}, {"role": "assistant", "content": ANSWERS[1]}]
    ids = scorer.tokenizer.apply_chat_template(text, return_dict=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want = scorer.model(input_ids=ids).logits[0, 0].item()
    assert scorer([PROMPTS[1]], [ANSWERS[1]])[0] == pytest.approx(want, abs=1e-5)


def test_scaling_file_beside_the_checkpoint(scorer, tmp_path):
    plain = scorer(PROMPTS, ANSWERS)
    (tmp_path / SCALING_FILE).write_text(json.dumps({"mean": 2.0, "std": 0.5}))
    scaled = LearnedPreference(str(tmp_path), model=scorer.model, tokenizer=scorer.tokenizer)(PROMPTS, ANSWERS)
    assert scaled == pytest.approx([(score - 2.0) / 0.5 for score in plain], abs=1e-4)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"mean": 0.0, "std": 0.0}, "std=0.0 must be above 0"),
        ({"mean": None, "std": 1.0}, "mean=None, std=1.0; both must be finite"),
        ({"std": 1.0}, "mean=None"),
    ],
)
def test_a_bad_scaling_file_raises_before_the_model_loads(tmp_path, content, message):
    (tmp_path / SCALING_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        LearnedPreference(str(tmp_path))


def test_a_shared_model_keeps_its_mode_and_gets_no_gradient():
    model = load_scalar_model(SOURCE).train()
    scorer = LearnedPreference(model=model, tokenizer=load_tokenizer(SOURCE))
    scorer(PROMPTS, ANSWERS)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_conversation_beyond_the_positions_gets_none(scorer):
    limit = scorer.model.config.max_position_embeddings
    scores = scorer(["Why?", "Why?"], ["word " * limit, "Because."])
    assert scores[0] is None and scores[1] is not None


def test_what_must_be_given():
    with pytest.raises(ValueError, match="needs a model_path, or both a model and a tokenizer"):
        LearnedPreference()


def test_the_whole_conversation_is_read_also_inside_a_composite():
    """Opposite system prompts, and opposite earlier turns, get different scores; other parts read the last turn alone."""
    from plumbline.policy_models.loading import load_scalar_model, load_tokenizer
    from plumbline.reward import CompositeReward

    class Seen:
        name = "seen"

        def __call__(self, prompts, answers):
            assert prompts == ["Name a tree.", "Name a tree.", "Name a tree."]
            return [0.0] * 3

    source = "bundled:tiny-llama"
    learned = LearnedPreference(model=load_scalar_model(source), tokenizer=load_tokenizer(source))
    user = {"role": "user", "content": "Name a tree."}
    prompts = [[{"role": "system", "content": f"Answer in {tongue} only."}, user] for tongue in ("French", "English")]
    reward = CompositeReward([(learned, 1.0), (Seen(), 0.0)])
    scores = reward([*prompts, "Name a tree."], ["Oak."] * 3).parts.raw["preference"]
    assert len(set(scores)) == 3
    whole = learned.score_conversations([[*p, {"role": "assistant", "content": "Oak."}] for p in [*prompts, [user]]])
    assert scores == pytest.approx(whole)
    ensemble = PreferenceEnsemble([learned, learned], caution=0.0)
    assert CompositeReward([(ensemble, 1.0)])(prompts, ["Oak."] * 2).total == pytest.approx(whole[:2])


def test_a_row_that_ends_with_the_padding_token_is_scored_at_its_end():
    """Where the end token pads, as with GPT-2, transformers would read the score one token earlier."""
    from plumbline.policy_models.loading import last_token_scores, load_scalar_model

    model = load_scalar_model("bundled:tiny-llama")
    ids, keep = torch.tensor([[5, 6, 2], [5, 2, 2]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    want = last_token_scores(model, ids * keep, keep)  # pads with 0: transformers is right
    model.config.pad_token_id = 2
    torch.testing.assert_close(last_token_scores(model, ids, keep), want)
    assert not torch.allclose(model(input_ids=ids, attention_mask=keep).logits[:, 0], want)
