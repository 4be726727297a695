"""Where a stage starts and what it leaves: the settings of its model, loading it, saving it with adapters merged."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.pytorch_utils import Conv1D

from plumbline.align.runtime.launch import pick_dtype, replacing
from plumbline.policy_models.attention import default_attention
from plumbline.policy_models.compression.quantise import quantise as quantise_model
from plumbline.policy_models.loading import attach_adapter, load_policy, load_scalar_model


@dataclass(kw_only=True)
class ModelSettings:
    """Where a stage starts and what of it is trained; every stage takes these."""

    model: str = field(
        default="bundled:tiny-moe", metadata={"help": "start: bundled name, folder, adapter folder or hub id"}
    )
    dtype: str = field(default="auto", metadata={"help": "of the computation: auto, bfloat16, float16 or float32"})
    lora: bool = field(default=True, metadata={"help": "adapters on one set of weights; false: full fine-tuning"})
    lora_r: int = field(default=16, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=32, metadata={"help": "scale of the adapters: alpha / r"})
    lora_targets: str = field(default="all-linear", metadata={"help": "all-linear, or names of modules with commas"})
    lora_top_layers: int | None = field(
        default=None, metadata={"help": "adapters on the last n layers only: no backward through the others; none: all"}
    )
    lora_experts: bool = field(default=False, metadata={"help": "adapters on the experts too"})
    resume: bool = field(default=False, metadata={"help": "go on from the newest checkpoint in output_dir"})
    quantise: str = field(
        default="none",
        metadata={"help": "bits of the frozen weights under the adapters, experts too: none, 8bit or 4bit"},
    )

    def __post_init__(self) -> None:
        if self.quantise not in ("none", "8bit", "4bit"):
            raise ValueError(f"quantise={self.quantise!r}: must be none, 8bit or 4bit (int8 has no gradient)")
        if self.quantise != "none" and not self.lora:
            raise ValueError(
                f"quantise={self.quantise!r} with lora=false: packed weights cannot be trained; set lora: true"
            )
        if self.lora_experts and not self.lora:
            raise ValueError("lora_experts=true with lora=false: full fine-tuning trains the experts anyway; drop it")
        if self.lora and self.lora_r < 1:
            raise ValueError(f"lora_r={self.lora_r}: must be at least 1; use lora: false for full fine-tuning")
        pick_dtype(self.dtype)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Full fine-tuning keeps fp32 weights: an update of a bf16 weight is often below its rounding."""
        return pick_dtype(self.dtype) if self.lora else torch.float32

    def check_precision(self, args: TrainingArguments) -> None:
        """TRL's stages compute in what `bf16` and `fp16` say; ValueError where that is not `dtype`."""
        dtype = pick_dtype(self.dtype)
        for name, wanted in (("bf16", dtype == torch.bfloat16), ("fp16", dtype == torch.float16)):
            if bool(getattr(args, name)) != wanted:
                raise ValueError(
                    f"dtype={self.dtype!r} and {name}={getattr(args, name)} clash: set {name}: {str(wanted).lower()}"
                )

    def lora_config(self, model: PreTrainedModel, *, task_type: str = "CAUSAL_LM") -> LoraConfig | None:
        """LoRA on the linear layers named by `lora_targets` and, if asked, on the experts; None for full fine-tuning.

        Experts are 3-D parameters that "all-linear" does not reach. ValueError for experts on a model without them.
        """
        if not self.lora:
            return None
        experts = sorted(
            {".".join(name.split(".")[-3:]) for name, _ in model.named_parameters() if ".experts." in name}
        )
        if self.lora_experts and not experts:
            raise ValueError(
                "lora_experts=true, but the model has no experts; set it to false or upcycle the model first"
            )
        targets: str | list[str] = self.lora_targets
        if self.lora_targets != "all-linear" or self.lora_top_layers:
            targets = self._linear_names(model)
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=0.0,
            target_modules=targets,
            target_parameters=experts if self.lora_experts else None,
            task_type=task_type,
        )

    def _linear_names(self, model: PreTrainedModel) -> list[str]:
        """Full names of the linear layers that the settings choose; ValueError when they choose none."""
        named = {t.strip() for t in self.lora_targets.split(",")}
        wanted = None if self.lora_targets == "all-linear" else named
        first = model.config.num_hidden_layers - (self.lora_top_layers or model.config.num_hidden_layers)
        names, known = [], set()
        for name, module in model.named_modules():
            layer = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", f".{name}.")
            linear = isinstance(module, nn.Linear | Conv1D)
            if linear and layer:
                known.add(name.rsplit(".", 1)[-1])
            if linear and layer and int(layer.group(1)) >= first and (not wanted or name.rsplit(".", 1)[-1] in wanted):
                names.append(name)
        if strangers := sorted((wanted or set()) - known):
            raise ValueError(
                f"lora_targets={self.lora_targets!r}: {', '.join(map(repr, strangers))} name no linear layer of a block of "
                f"{type(model).__name__}; there are {', '.join(sorted(known))} (the head and the embeddings take none)"
            )
        if not names:
            raise ValueError(
                f"lora_targets={self.lora_targets!r} with lora_top_layers={self.lora_top_layers} match no linear layer "
                f"of {type(model).__name__}; use all-linear or names such as q_proj,v_proj"
            )
        return names


def load_start(source: str, *, dtype: torch.dtype, quantise: str = "none") -> PreTrainedModel:
    """A model to start a stage from. An adapter folder is merged into its base first, so that "adapters off" is it."""
    model = _load_dense(source, dtype)
    return model if quantise == "none" else quantise_model(model, quantise)


def _load_dense(source: str, dtype: torch.dtype) -> PreTrainedModel:
    folder = Path(source)
    if (folder / "adapter_config.json").is_file():
        adapter = LoraConfig.from_pretrained(str(folder))
        base = load_policy(str(adapter.base_model_name_or_path), dtype=torch.float32)
        # merged in fp32 and rounded once: bf16 weights would swallow small updates one by one
        merged = attach_adapter(base, folder).merge_and_unload()
        return cast_parameters(merged, dtype)
    return load_policy(source, dtype=dtype, attn_implementation=default_attention())


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Casts parameters only: `.to(dtype)` would round the rotary frequencies, which are fp32 buffers, too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def save_merged(trainer: Any, settings: ModelSettings, run: Path, tokenizer: Any, *, scalar: bool = False) -> None:
    """Saves the trained model of a TRL stage as a plain model folder `run/model`, LoRA merged.

    Merged in fp32 on freshly loaded weights, then rounded once: bf16 weights would swallow small updates one by one.
    """
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if settings.lora:
            with replacing(run / "adapter") as folder:
                model.save_pretrained(folder)
            load = load_scalar_model if scalar else load_start
            base = load(settings.model, dtype=torch.float32)
            model = attach_adapter(base, run / "adapter").merge_and_unload()
        with replacing(run / "model") as folder:
            cast_parameters(model, pick_dtype(settings.dtype)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()
