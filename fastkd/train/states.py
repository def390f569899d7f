"""What a model computed on the way: hidden states, and the queries, keys and values of its attention layers.

Hidden states come from `output_hidden_states`. Queries, keys and values come through transformers' attention interface:
an implementation named "fastkd" records them and hands over to SDPA, so nobody needs eager attention. Its mask function
is SDPA's own; without a registered one transformers would pass no mask at all, and padding would be attended to.

Gradient checkpointing: only the first forward records; what backward recomputes is not seen again. The non-reentrant
kind (transformers' default) keeps the recorded tensors in the graph; the reentrant kind would not, and is refused.
"""

import contextlib
import math
from collections.abc import Collection, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .heads import Finish, Headless, Sparse, in_eval_mode, taken_off, whole

ATTENTION = "fastkd"
# What a call may be given that makes the scores something else than scale·q·kᵀ under a mask.
_OTHER_SCORES = {
    "softcap": "caps them by a tanh", "position_bias": "adds a bias by position", "s_aux": "adds attention sinks",
    "sinks": "adds attention sinks", "indices": "selects keys by a score of its own",
    "block_indices": "selects keys by a score of its own",
}  # fmt: skip
_recorder: ContextVar["_Recorder | None"] = ContextVar("fastkd_recorder", default=None)


class QKV(NamedTuple):
    """One attention layer: q, k, v [B, H, S, d], after any rotary embedding; its scores are q·kᵀ·scale under the mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    def normalized(self) -> tuple[Tensor, Tensor, Tensor]:
        """(q, k, v) with the query rescaled so that the model's scores are q·kᵀ/√d, as the losses compute them."""
        factor = self.scale * math.sqrt(self.q.shape[-1])
        return self.q if math.isclose(factor, 1.0) else self.q * factor, self.k, self.v


@dataclass(frozen=True)
class States:
    """predictions: logits, or what they are made of. hidden: N + 1 levels [B, S, D], embeddings first. qkv: every layer
    asked for (0-based); keys and values may have fewer, grouped heads. None where it was not asked for."""

    predictions: Tensor | Headless | Sparse | None
    hidden: tuple[Tensor | None, ...] | None = None
    qkv: dict[int, QKV] | None = None

    @property
    def logits(self) -> Tensor:
        """All of them, made now where the model ran without its head."""
        if isinstance(self.predictions, Sparse):
            raise ValueError(
                "teacher_cache: this method reads all logits of the teacher, and the cache has those of a few tokens; make "
                "another without top_k and samples, which keeps the states before the teacher's head"
            )
        return whole(self.predictions)

    def over(self, tokens) -> "States":
        """Predictions over these tokens of the vocabulary, or these labels."""
        x = self.predictions
        return replace(self, predictions=x.of(tokens) if isinstance(x, Headless) else x[..., tokens])

    def tensors(self) -> list[Tensor]:
        """All that the model put out."""
        x = self.predictions
        first = [x.hidden if isinstance(x, Headless) else x]
        found = [*first, *(self.hidden or ()), *(x for layer in (self.qkv or {}).values() for x in layer)]
        return [x for x in found if isinstance(x, Tensor)]


class _Recorder:
    """Counts the attention calls of one forward, and keeps the tensors of the layers that were asked for."""

    def __init__(self, layers: Sequence[int]):
        self.layers, self.calls, self.kept = set(layers), 0, {}

    def see(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask, options: dict) -> None:
        if self.calls in self.layers:
            scale = options.get("scaling")
            scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
            own = getattr(module, "scaling", None)
            if isinstance(own, float) and own and own != scale:  # the query was scaled before the call
                query, scale = query * (scale / own), own
            self.kept[self.calls] = QKV(query, key, value, scale)
        self.calls += 1


class _Trial(_Recorder):
    """Refuses scores that are not scale·q·kᵀ under a mask, in a forward of a few tokens before training."""

    def __init__(self, kind: str):
        super().__init__(())
        self.kind = kind

    def see(self, module, query, key, value, mask, options):
        super().see(module, query, key, value, mask, options)
        why_not = next((reason for name, reason in _OTHER_SCORES.items() if options.get(name) is not None), None)
        if mask is not None and mask.is_floating_point() and bool(((mask != 0) & (mask > -1e4)).any()):
            why_not = "adds a bias to them"
        if isinstance(options.get("scaling"), Tensor):
            why_not = "learns their scale"
        if query.shape[2] != key.shape[2]:
            why_not = "attends to other tokens too"
        if why_not is not None:
            raise ValueError(
                f"{self.kind}: its attention scores are not scale·q·kᵀ under a mask (it {why_not}), so they cannot be "
                "compared; choose a method that uses hidden states or logits only"
            )


def _attention(module, query, key, value, attention_mask, **kwargs):
    recorder = _recorder.get()
    if recorder is not None:
        recorder.see(module, query, key, value, attention_mask, kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def depth(model: nn.Module) -> int:
    """The number of layers, embeddings not counted."""
    return model.config.get_text_config().num_hidden_layers


def is_causal(model: nn.Module) -> bool:
    """Whether a token's state depends on no later token: its attention says so; where it does not, two tokens are asked."""
    said = [x for module in model.modules() if isinstance(x := getattr(module, "is_causal", None), bool)]
    if said:
        return any(said)
    embeddings, seen = model.get_input_embeddings(), []
    hook = embeddings.register_forward_hook(
        lambda module, args, out: seen.append(out.detach().requires_grad_()) or seen[-1]
    )
    with in_eval_mode(model), torch.enable_grad():
        try:
            hidden = model(input_ids=_tokens(model, 2), output_hidden_states=True, return_dict=True).hidden_states[-1]
        finally:
            hook.remove()
    weights = torch.linspace(0, 1, hidden.shape[-1], device=hidden.device)  # a plain sum is constant behind a LayerNorm
    (gradient,) = torch.autograd.grad((hidden[0, 0] * weights).sum(), seen[0])
    return not bool(gradient[0, 1].any())


def _tokens(model: nn.Module, length: int) -> Tensor:
    """[1, length] token ids, of which none pads."""
    ids = torch.arange(model.get_input_embeddings().weight.shape[0])[-length:]
    return ids[None].to(model.get_input_embeddings().weight.device)


def record_attention(model: nn.Module) -> None:
    """Let `model` use the recording attention from now on. Its results are SDPA's, bit for bit.

    Raises where the model's scores cannot be computed from queries and keys, and leaves the model as it was.
    """
    kind = type(model).__name__
    now = model.config._attn_implementation
    if now not in (None, "sdpa", "eager", ATTENTION):
        raise ValueError(
            f"{kind}: this method reads queries and keys, which is done beside SDPA, but the model was loaded with "
            f"attn_implementation={now!r}; load it with attn_implementation='sdpa'"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{kind}: an encoder-decoder has three kinds of attention, and this method compares one; choose a method that "
            "uses hidden states or logits only"
        )
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:
        raise ValueError(
            f"{kind}: its attention does not go through transformers' attention interface, so queries and keys cannot be "
            "read; choose a method that uses hidden states or logits only"
        )
    try:
        _try(model, kind)
    except Exception:
        model.set_attn_implementation(now)
        raise


@torch.no_grad()
def _try(model: nn.Module, kind: str) -> None:
    trial = _Trial(kind)
    before = _recorder.set(trial)
    try:
        with in_eval_mode(model):
            model(input_ids=_tokens(model, 4))
    finally:
        _recorder.reset(before)
    if trial.calls != depth(model):
        raise ValueError(
            f"{kind}: {trial.calls} attention layers can be read of its {depth(model)} layers; choose a method that uses "
            "hidden states or logits only"
        )


def forget_attention(model: nn.Module) -> None:
    """Back to plain SDPA, as before `record_attention`."""
    if model.config._attn_implementation == ATTENTION:
        model.set_attn_implementation("sdpa")


def read(
    model: nn.Module,
    inputs: dict,
    *,
    hidden: bool | Collection[int] = False,
    layers: Sequence[int] = (),
    finish: Finish | None = None,
    predictions: bool = True,
    stop: int | None = None,
    output: str = "logits",
) -> States:
    """One forward of `model` (wrapped by DDP or not: it is called as it is), and what was asked for of it.

    hidden: the levels of the hidden states that are read, or True for all; the others are None.
    layers: which layers' queries, keys and values (0-based); `record_attention` must have been called on the model.
    finish: what heads.find said of the model; its head is then not run. predictions=False: none are read.
    stop: the layers above so many do not run, as `stop_after` allows it.
    output: which output of the model its predictions are; of a model without a head "last_hidden_state".
    """
    inside = extract_model_from_parallel(model, keep_torch_compile=False)
    recorder = _Recorder(layers) if len(layers) else None
    options = {"output_hidden_states": True} if hidden else {}
    with contextlib.ExitStack() as stack:
        taken = None if finish is None else stack.enter_context(taken_off(inside, finish))
        if stop is not None:
            stack.enter_context(_shortened(inside, stop))

        def pass_out(module, args, outputs) -> dict:
            made = outputs.get(output) if taken is None else taken[0]
            return {
                "predictions": made if predictions else None, "hidden": outputs.hidden_states if hidden else None,
                "qkv": None if recorder is None else recorder.kept,
            }  # fmt: skip

        # All that is read passes through the wrapper, which looks for the parameters that its outputs depend on.
        hooked = not is_compiled_module(getattr(model, "module", model))  # compiled code does not look at hooks again
        if hooked:
            stack.callback(inside.register_forward_hook(pass_out).remove)
        stack.callback(_recorder.reset, _recorder.set(recorder))
        outputs = model(**inputs, **options, return_dict=True)
        outputs = outputs if hooked else pass_out(model, (), outputs)
    if hidden and not outputs["hidden"]:
        raise RuntimeError(
            f"{_name(model)} returned no hidden states, although they were asked for; it cannot be distilled"
        )
    if predictions and outputs["predictions"] is None:
        raise ValueError(
            f"{_name(model)}: its forward returns no logits, since it is a model without a head; load it with the class of its "
            "task, for example AutoModelForSequenceClassification"
            if output == "logits"
            else f"{_name(model)}: its forward returns no {output}, since it is a model with a head; load it with AutoModel"
        )
    if recorder is not None:
        _check_recorded(model, recorder, layers)
    if hidden and hidden is not True:
        made = dict(enumerate(outputs["hidden"]))
        outputs["hidden"] = tuple(made[i] if i in hidden else None for i in range(depth(inside) + 1))
    return States(**outputs)


def layer_list(model: nn.Module) -> str:
    """The name of the module list that holds the model's layers."""
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth(model)]
    if len(lists) != 1:
        raise ValueError(
            f"{type(model).__name__}: cannot tell which of its module lists {lists} holds the {depth(model)} layers; make "
            "the student by configuration instead (--student-config)"
        )
    return lists[0]


def stop_after(model: nn.Module, layers: Sequence[int], levels: Sequence[int]) -> int | None:
    """The depth at which a forward may end for a reader of these layers' queries, keys and values and of these levels of the
    hidden states, and of nothing else; None: it must not end before the last layer.

    Compared with a whole forward, on a few tokens. A model with a norm after its last layer needs one layer more.
    """
    least = max(max(layers, default=-1) + 1, max(levels, default=0))
    for stop in (least, least + 1):
        if not 0 < stop < depth(model):
            return None
        with torch.no_grad(), contextlib.suppress(Exception):  # whatever a model's code makes of fewer layers
            whole, short = (
                read(
                    model, {"input_ids": _tokens(model, 4)}, hidden=levels, layers=layers, predictions=False, stop=d
                ).tensors()
                for d in (None, stop)
            )
            if len(whole) == len(short) and all(map(torch.equal, whole, short)):
                return stop
    return None


@contextlib.contextmanager
def _shortened(model: nn.Module, depth: int):
    """The model without its upper layers meanwhile."""
    path, _, name = layer_list(model).rpartition(".")
    parent = model.get_submodule(path)
    whole = getattr(parent, name)
    setattr(parent, name, whole[:depth])
    try:
        yield
    finally:
        setattr(parent, name, whole)


def _check_recorded(model: nn.Module, recorder: _Recorder, layers: Sequence[int]) -> None:
    if recorder.calls == 0:
        raise RuntimeError(
            f"{_name(model)}: no attention layer was seen, so this method would have nothing to learn from; call "
            "fastkd.train.states.record_attention(model) first, and do not change its attn_implementation afterwards"
        )
    missing = sorted(set(layers) - set(recorder.kept))
    if missing:
        raise RuntimeError(
            f"{_name(model)}: attention layers {missing} were asked for, but only {recorder.calls} were seen (0 to "
            f"{recorder.calls - 1})"
        )
    found = recorder.kept
    lost = torch.is_grad_enabled() and not any(x.requires_grad for layer in found.values() for x in layer[:3])
    if lost and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise RuntimeError(
            f"{_name(model)}: queries and keys were recorded without a gradient, as reentrant gradient checkpointing does; "
            "pass gradient_checkpointing_kwargs={'use_reentrant': False}"
        )


def _name(model: nn.Module) -> str:
    return type(getattr(model, "module", model)).__name__
