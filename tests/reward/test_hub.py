"""Classifiers from transformers as components and as scanners, on a tiny random one."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from plumbline.reward.components.toxicity import Toxicity
from plumbline.reward.hub import HubClassifier

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "rude", "kind", "tea", "rain"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(model with two labels, model with one, tokenizer)"""
    vocab = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    vocab.write_text("\n".join(WORDS))
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 24, "initializer_range": 0.5}
    two = BertForSequenceClassification(BertConfig(**sizes, id2label={0: "fine", 1: "Toxic"}))
    one = BertForSequenceClassification(BertConfig(**sizes, num_labels=1))
    return two, one, BertTokenizer(str(vocab), model_max_length=24)


def slow(model, tokenizer, *texts):
    model.eval()
    return model(**tokenizer(*texts, return_tensors="pt")).logits[0].detach()


def test_probability_of_the_label_in_any_batch(parts):
    two, _, tokenizer = parts
    texts = ["rude", "kind tea rain", "", "tea rude"]
    classifier = HubClassifier(model=two, tokenizer=tokenizer, label="toxic", batch_size=2)
    want = [float(slow(two, tokenizer, text).softmax(-1)[1]) if text else 0.0 for text in texts]
    assert classifier.risk(texts) == pytest.approx(want, abs=1e-5)
    assert Toxicity(scanner=classifier)(["p"] * 4, texts) == pytest.approx(want, abs=1e-5)
    assert classifier(["p"] * 4, texts) == pytest.approx(want, abs=1e-5) and classifier([], []) == []
    assert HubClassifier(model=two, tokenizer=tokenizer, label=0)([""], ["tea"]) == pytest.approx(
        [1 - slow(two, tokenizer, "tea").softmax(-1)[1].item()], abs=1e-5
    )


def test_pairs_and_a_single_logit(parts):
    _, one, tokenizer = parts
    near = HubClassifier(model=one, tokenizer=tokenizer, reads="pair", name="relevance")
    want = float(slow(one, tokenizer, "tea rain", "kind").sigmoid()[0])
    assert near(["tea rain"], ["kind"]) == pytest.approx([want], abs=1e-5)
    with pytest.raises(ValueError, match="no risk of a text alone"):
        near.risk(["kind"])


def test_nothing_of_a_long_text_is_cut_away(parts):
    two, _, tokenizer = parts
    classifier = HubClassifier(model=two, tokenizer=tokenizer, label="toxic")
    alone = {word: classifier.risk([word])[0] for word in ("rude", "kind")}
    worst, best = max(alone, key=alone.get), min(alone, key=alone.get)
    long = " ".join([best] * 60 + [worst] * 30)
    windows = classifier.risk([" ".join([best] * 22), " ".join([worst] * 22)])
    assert classifier.risk([long])[0] >= max(windows) - 1e-5


def test_wrong_settings_name_the_way_out(parts):
    two, _, tokenizer = parts
    with pytest.raises(ValueError, match="the model's labels are"):
        HubClassifier(model=two, tokenizer=tokenizer, label="harm")
    with pytest.raises(ValueError, match="needs a source"):
        HubClassifier(label="toxic")
    with pytest.raises(ValueError, match="must be one of"):
        HubClassifier(model=two, tokenizer=tokenizer, reads="prompt")
