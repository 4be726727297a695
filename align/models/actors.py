"""Policy, reference and critic of a PPO run: one set of weights with adapters, or full copies.

LoRA mode holds the backbone once. The policy is the backbone with its adapter, the reference is the same with adapters
off (so it is the model that the run started from, after a resume too), the critic is the backbone with an adapter of
its own and a value head. Full mode holds a trained policy, a frozen copy as the reference and a third as the critic.
With `critic="head"` the critic is only a value head on the reference's hidden states: no third backbone, no forward of
its own.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput

from plumbline.align.parallel.sharding import shard, whole
from plumbline.align.rl.losses import like
from plumbline.policy_models.logprobs import PackedRows, Trunk, answer_logprobs, answer_states
from plumbline.policy_models.lora import split_expert_adapters
from plumbline.policy_models.rollout.trunk import frozen_layers, trunk_states

POLICY, CRITIC, REWARD = "policy", "critic", "reward"
CRITICS = ("own", "head", "none")


class ValueHead(nn.Module):
    """Hidden states (..., D) to values (...): one hidden layer, the last layer 0 at the start, always fp32.

    With `num_values` above 1, values are (..., num_values).
    """

    def __init__(self, hidden_size: int, num_values: int = 1, inner_size: int = 256) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, inner_size)
        self.out = nn.Linear(inner_size, num_values)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, states: Tensor) -> Tensor:
        values = self.out(torch.tanh(self.inner(states.float())))
        return values[..., 0] if values.shape[-1] == 1 else values


class Actors:
    """The models of a PPO run behind four calls: policy(), reference(), values(...), save_policy(...)."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        *,
        lora: LoraConfig | None,
        critic: str,
        autocast: torch.dtype | None = None,
        num_values: int = 1,
        gradient_checkpointing: bool = False,
        mesh: DeviceMesh | None = None,
    ) -> None:
        """`backbone` becomes the policy. `autocast` is the type that products are computed in, None for as stored.

        `num_values` is 2 for a critic of rewards and costs. With critic "none" there is nothing to call `values` on.
        With a `mesh`, which full fine-tuning alone takes, the layers of all models are sharded over its ranks and go to its devices.
        """
        if critic not in CRITICS:
            raise ValueError(f"critic={critic!r}: must be one of {', '.join(CRITICS)}")
        # evaluation mode throughout: two forwards over the same tokens must agree, so no dropout and no router jitter
        backbone.eval()
        self.critic = critic
        self.autocast = autocast
        self._mesh = mesh
        device = torch.device(mesh.device_type) if mesh else backbone.device
        self.value_head = ValueHead(backbone.config.hidden_size, num_values).to(device)
        if gradient_checkpointing:
            backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._checkpointing = gradient_checkpointing
        self._peft: PeftModel | None = None
        self._reference: PreTrainedModel | None = None
        self._critic_lm: PreTrainedModel | None = None
        if lora is not None:
            peft = get_peft_model(backbone, lora, adapter_name=POLICY)
            assert isinstance(peft, PeftModel)
            if critic == "own":
                peft.add_adapter(CRITIC, copy.deepcopy(lora))
            split_expert_adapters(peft)
            peft.set_adapter(POLICY)
            peft.eval()
            self._peft, self.lm = peft, cast(PreTrainedModel, peft.get_base_model())
        else:
            self.lm = backbone
            self._reference = copy.deepcopy(backbone).requires_grad_(False)
            self._critic_lm = copy.deepcopy(backbone) if critic == "own" else None
        if mesh is not None:
            for model in filter(None, (self.lm, self._reference, self._critic_lm)):
                shard(model, mesh, device, autocast)

    @property
    def sharded(self) -> bool:
        """Whether a forward outside `whole` waits for all ranks."""
        return self._mesh is not None

    @contextmanager
    def policy(self) -> Iterator[PreTrainedModel]:
        """The trained policy."""
        if self._peft is not None:
            self._peft.set_adapter(POLICY)
        with self._precision(), self._recomputing(self.lm):
            yield self.lm

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """The frozen model that the run started from."""
        if self._peft is not None:
            with self._peft.disable_adapter(), self._precision():
                yield self.lm
        else:
            assert self._reference is not None
            with self._precision():
                yield self._reference

    def values(self, packed: PackedRows, states_BRD: Tensor | None = None) -> Tensor:
        """V before each answer token, (B, R) fp32, or (B, R, num_values). With `critic="head"`, `states_BRD` are the reference's states."""
        if self.critic == "head":
            assert states_BRD is not None, "a head critic reads the reference's states"
            return self.value_head(states_BRD)
        lm = self.lm if self._critic_lm is None else self._critic_lm
        if self._peft is not None:
            self._peft.set_adapter(CRITIC)
        with self._precision(), self._recomputing(lm):
            states_BRD = answer_states(lm, packed)
        return self.value_head(states_BRD)  # outside autocast: a value in bf16 keeps 8 bits of the return

    @torch.no_grad()
    def measure(
        self,
        packs: Sequence[tuple[list[int], PackedRows]],
        keep: Tensor,
        *,
        temperature: float,
        policy_logp: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(policy log-probabilities, reference log-probabilities, values), each (B, R), and the reference's states.

        `packs` are (rows, packed) over all B rows. One model at a time over all of them: switching adapters touches
        every layer. With `policy_logp` the first is that. Values are (B, R, num_values) where there are several, and
        zeros without a critic; states are (B, R, D) with `critic="head"`, else None.
        """
        policy, reference = (torch.zeros(keep.shape, device=keep.device) for _ in range(2))
        if policy_logp is not None:
            policy = policy_logp
        else:
            with self.policy() as model, whole(model):
                for rows, pack in packs:
                    policy[rows, : pack.keep.shape[1]] = answer_logprobs(model, pack, temperature=temperature)[0]
        states: list[Tensor] | None = [] if self.critic == "head" else None
        with self.reference() as model, whole(model):
            for rows, pack in packs:
                logp, _ = answer_logprobs(model, pack, temperature=temperature, states_out=states)
                reference[rows, : pack.keep.shape[1]] = logp
        num_values = self.value_head.out.out_features
        value = torch.zeros(*keep.shape, *([num_values] if num_values > 1 else []), device=keep.device)
        with whole(self._critic_lm):
            for at, (rows, pack) in enumerate(packs if self.critic != "none" else []):
                value_BR = self.values(pack, states[at] if states else None)
                value[rows, : pack.keep.shape[1]] = value_BR.masked_fill(~like(pack.keep, value_BR), 0.0)
        if not states:
            return policy, reference, value, None
        all_states = torch.zeros(*keep.shape, states[0].shape[-1], device=keep.device)
        for (rows, _), part in zip(packs, states, strict=True):
            all_states[rows, : part.shape[1]] = part
        return policy, reference, value, all_states

    def trunk(self, packs: Sequence[PackedRows], groups: Sequence[Sequence[int]]) -> Trunk | None:
        """What the layers below the first adapter make of the packed rows, in the order of rows; None without any.

        `groups` says which rows each pack holds.
        """
        layers = 0 if self._peft is None else frozen_layers(self.lm)
        if layers == 0:
            return None
        states: dict[int, Tensor] = {}
        with self._precision():
            for pack, rows in zip(packs, groups, strict=True):
                part = trunk_states(self.lm, layers, **pack.inputs())
                kept = pack.attention_mask.bool()
                states |= {row: part[at][kept[at]] for at, row in enumerate(rows)}
        return Trunk(states=[states[row] for row in sorted(states)], num_layers=layers)

    def reward_model(self, folder: Path) -> "SharedRewardModel":
        """A reward model trained as an adapter on the same start, as a third adapter on these weights.

        ValueError for an adapter of another start, or one without a scalar head.
        """
        assert self._peft is not None, "there is one set of weights in LoRA mode only"
        config = LoraConfig.from_pretrained(str(folder))
        start = str(self.lm.config._name_or_path)
        if config.base_model_name_or_path and Path(str(config.base_model_name_or_path)).name != Path(start).name:
            raise ValueError(
                f"{folder}: an adapter of {config.base_model_name_or_path}, this run starts from {start}; "
                "train the reward model on this start, or name its merged folder (run/model)"
            )
        weights = load_file(folder / "adapter_model.safetensors")
        heads = [tensor for name, tensor in weights.items() if name.endswith("score.weight")]
        if len(heads) != 1:
            raise ValueError(f"{folder}: no scalar head among its weights; is it the adapter of a reward model?")
        config.task_type, config.modules_to_save = "CAUSAL_LM", None
        self._peft.add_adapter(REWARD, config)
        lora = {name: tensor for name, tensor in weights.items() if "lora_" in name}
        unexpected = set_peft_model_state_dict(self._peft, lora, adapter_name=REWARD).unexpected_keys  # type: ignore[attr-defined]
        if unexpected:
            raise ValueError(f"{folder}: adapter weights that this model lacks: {unexpected[:3]}")
        for name, parameter in self._peft.named_parameters():
            if f".{REWARD}" in name:
                parameter.requires_grad_(False)
        self._peft.set_adapter(POLICY)
        self._peft.eval()
        return SharedRewardModel(self, heads[0])

    def policy_parameters(self) -> list[nn.Parameter]:
        """What the policy's optimizer group trains."""
        if self._peft is None:
            return [p for p in self.lm.parameters() if p.requires_grad]
        return [p for n, p in self._peft.named_parameters() if f".{POLICY}" in n and "lora_" in n]

    def critic_parameters(self) -> list[nn.Parameter]:
        """What the critic's optimizer group trains, the value head included."""
        own: list[nn.Parameter] = []
        if self.critic == "none":
            return own
        if self._critic_lm is not None:
            own = list(self._critic_lm.base_model.parameters())
        elif self._peft is not None and self.critic == "own":
            own = [p for n, p in self._peft.named_parameters() if f".{CRITIC}" in n and "lora_" in n]
        return own + list(self.value_head.parameters())

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Everything trained, on the CPU, by part; the frozen backbone is not in it in LoRA mode."""
        state = {"value_head": self.value_head.state_dict()}
        if self._peft is not None:
            trained = (f".{POLICY}", f".{CRITIC}")  # the reward adapter is read from its folder each time
            state["adapters"] = {
                n: p for n, p in self._peft.state_dict().items() if "lora_" in n and any(t in n for t in trained)
            }
        else:
            state["policy"] = self.lm.state_dict()
            if self._critic_lm is not None:
                state["critic"] = self._critic_lm.state_dict()
        return {part: {n: p.detach().cpu() for n, p in tensors.items()} for part, tensors in state.items()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restores `state_dict`; the reference stays what the run started from."""
        self.value_head.load_state_dict(state["value_head"])
        if self._peft is not None:
            result = self._peft.load_state_dict(state["adapters"], strict=False)
            if result.unexpected_keys:
                raise ValueError(f"checkpoint holds adapters that this run lacks: {result.unexpected_keys[:3]}")
        else:
            self.lm.load_state_dict(state["policy"])
            if self._critic_lm is not None:
                self._critic_lm.load_state_dict(state["critic"])

    def save_policy(self, folder: Path, *, write: bool = True) -> None:
        """The policy as others load it: an adapter folder in LoRA mode, a model folder otherwise.

        All ranks call it together, since they may have to bring their shards; one of them writes.
        """
        state = None
        if self._mesh is not None:
            state = get_model_state_dict(self.lm, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if not write:
            return
        if self._peft is not None:
            self._peft.save_pretrained(str(folder), selected_adapters=[POLICY])
            # PEFT puts a named adapter one folder down; users expect adapter_config.json at the top
            for file in (folder / POLICY).iterdir():
                file.replace(folder / file.name)
            (folder / POLICY).rmdir()
        else:
            self.lm.save_pretrained(folder, state_dict=state)

    @contextmanager
    def _recomputing(self, lm: PreTrainedModel) -> Iterator[None]:
        """Lets layers forget their activations: transformers does so in layers in training mode only.

        The flag is set on the layers and not below them, where it would switch dropout and router jitter on.
        """
        layers = [m for m in lm.modules() if isinstance(m, GradientCheckpointingLayer)] if self._checkpointing else []
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def _precision(self):
        enabled = self.autocast is not None
        return torch.autocast(self.lm.device.type, dtype=self.autocast or torch.bfloat16, enabled=enabled)


class SharedRewardModel:
    """The reward adapter and its head behind the calls of a sequence-classification model with one label."""

    training = False

    def __init__(self, actors: Actors, head_1D: Tensor) -> None:
        self._actors = actors
        self._head_1D = head_1D.float().to(actors.lm.device)
        self.config = copy.deepcopy(actors.lm.config)
        self.config.num_labels = 1

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Scores (B, 1) at the last kept token of right-padded rows."""
        actors = self._actors
        assert actors._peft is not None
        actors._peft.set_adapter(REWARD)
        with actors._precision():
            states = actors.lm.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        actors._peft.set_adapter(POLICY)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        last_BD = states.last_hidden_state[rows, attention_mask.sum(dim=1) - 1].float()
        return SequenceClassifierOutput(logits=last_BD @ self._head_1D.T)

    def parameters(self) -> Iterator[Tensor]:
        """The backbone's, for their device."""
        return self._actors.lm.parameters()

    def eval(self) -> "SharedRewardModel":
        """Always in evaluation mode."""
        return self

    def train(self, mode: bool = True) -> "SharedRewardModel":
        """Stays in evaluation mode."""
        return self
