"""What VocabMap.shrink needs to know of a Hugging Face model."""

import copy

import torch
from torch import Tensor


def configurations(model) -> list:
    """The model's configurations that hold special ids: its own, that of its text part, that of generation."""
    generation = getattr(model, "generation_config", None)
    unique = {id(c): c for c in (model.config, text_part(model.config), generation) if c is not None}
    return list(unique.values())


def text_part(configuration):
    return configuration.get_text_config() if hasattr(configuration, "get_text_config") else configuration


def position_tables(model, padding: int) -> set[str]:
    """RoBERTa and its relatives count positions from the padding id: the names of their position embeddings."""
    tables = {name: x for name, x in model.named_modules() if name.endswith("position_embeddings")}
    return {f"{name}.weight" for name, x in tables.items() if getattr(x, "padding_idx", None) == padding}


def vocabulary_axes(model, size: int) -> dict[str, list[int]]:
    """The vocabulary axes of the model's tensors: those that grow when the vocabulary does."""
    config = copy.deepcopy(model.config)
    config.get_text_config().vocab_size = size + 1
    with torch.device("meta"):
        longer = {name: x.shape for name, x in type(model)(config).state_dict().items()}
    return {
        name: [axis for axis, n in enumerate(longer.get(name, x.shape)) if axis < x.dim() and n == x.shape[axis] + 1]
        for name, x in model.state_dict().items()
    }


def build(model, config, state: dict[str, Tensor]):
    """A model of this configuration and these tensors, in the mode and with the trainable parameters of `model`."""
    from transformers.initialization import no_init_weights

    kind, before = type(model), torch.get_default_dtype()
    try:
        torch.set_default_dtype(model.dtype)
        with no_init_weights(), model.device:
            small = kind(config)
        small.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"model: a {kind.__name__} with a smaller vocabulary has other tensors: {error}") from error
    finally:
        torch.set_default_dtype(before)
    small.tie_weights()
    trained = {name: x.requires_grad for name, x in model.named_parameters(remove_duplicate=False)}
    for name, x in small.named_parameters():
        x.requires_grad_(trained[name])
    return small.train(model.training)
