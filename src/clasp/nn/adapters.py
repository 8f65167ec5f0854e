"""New parts for a tower, each put in by one function: bottlenecks, appended blocks, prompts, peft's methods.

In go a net and its anatomy, out come the names of the parameters that are new. Bottlenecks are children of their block
and act through forward hooks, so no parameter of the base changes its name. peft wraps linear layers instead; its names
appear as peft gives them (``…q_proj.lora_A.default.weight``) and the wrapped base as ``…q_proj.base_layer.weight``.
The only module that imports peft. ``truncate``, which takes blocks away, is here because ``append_blocks`` is.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from clasp.nn.anatomy import Anatomy, Block, anatomy, is_norm
from clasp.nn.layers import Adapter
from clasp.types import UserError

PLACES = ("output", "input")
STARTS = ("identity", "random")
DEEP_STARTS = ("copy", "random")
PEFT = ("lora", "dora", "rslora", "ia3", "loha", "lokr", "oft", "hra")


def insert_adapters(
    net: nn.Module, parts: Anatomy, blocks: Iterable[Block], *, reduction: int, place: str, start: str
) -> set[str]:
    """Put a bottleneck at every residual branch of ``blocks``, at the branch's ``input`` or its ``output``.

    LilT (section 3) has them at the input, before the norm, in its image tower and at the output, before the residual
    sum, in its text tower. ``reduction`` divides the branch's width. Returns the names of the new parameters.
    Raises ``UserError`` when no such place is known in the net's family.
    """
    names: set[str] = set()
    for block in blocks:
        places = block.begins if place == "input" else block.ends
        if not places:
            what = "the module a branch begins with" if place == "input" else "its attention and MLP modules"
            raise UserError(
                f"adapters(place={place!r}): {parts.family} has no known branch {place} in {block.path}; "
                f"looked for {what}"
            )
        owner = net.get_submodule(block.path)
        for number, path in enumerate(places, 1):
            module = net.get_submodule(path)
            width = _width(net, path, module, place)
            with torch.device(next(module.parameters(), next(owner.parameters())).device):
                adapter = Adapter(width, max(1, width // reduction), start, _is_map(module, parts, place))
            name = f"adapter{number}"
            owner.add_module(name, adapter)
            _attach(module, adapter, place)
            names |= {f"{block.path}.{name}.{p}" for p, _ in adapter.named_parameters()}
    return names


def append_blocks(net: nn.Module, parts: Anatomy, count: int, start: str) -> set[str]:
    """Append ``count`` blocks above the last one: copies of it, or fresh ones of the same shape (LilT's deep adapter).

    The paper starts them at random; a copy keeps the states near what the final norm and the pooling expect. Returns
    the names of the new blocks' parameters. Raises ``UserError`` for a net above whose last block none can stand.
    """
    last = parts.blocks[-1].path
    container_path, _, index = last.rpartition(".")
    container, block = net.get_submodule(container_path), net.get_submodule(last)
    if not isinstance(container, nn.ModuleList | nn.Sequential):
        raise UserError(
            f"deep: {parts.family} keeps its blocks in a {type(container).__name__}; a block cannot be appended"
        )
    if not _keeps_width(block):
        raise UserError(
            f"deep: the last block of {parts.family} changes the width of its input, so a copy cannot stand above it; "
            "use last(n) or adapters instead"
        )
    names: set[str] = set()
    for number in range(int(index) + 1, int(index) + 1 + count):
        new = copy.deepcopy(block)
        if start == "random":
            _start_afresh(new)
        container.append(new)
        names |= {f"{container_path}.{number}.{name}" for name, _ in new.named_parameters()}
    _tell_config(net, len(container))
    return names


def inject_peft(net: nn.Module, method: str, targets: list[str], options: dict[str, Any]) -> set[str]:
    """Wrap the linear layers ``targets`` with a peft method; returns the names of the parameters it added.

    ``rank`` and ``alpha`` are spelt as in the papers and handed to peft under its names; other options go to peft as
    they are. Raises ``UserError`` for an option that the method does not have.
    """
    before = {id(p) for p in net.parameters()}
    config = _peft_config(method, targets, options)
    from peft import inject_adapter_in_model

    for path in targets:
        _padding_as_numbers(net.get_submodule(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of merging and saving, which clasp does itself
        inject_adapter_in_model(config, net)
    if method == "oft":
        _tell_maps_from_convolutions(net)
    return {name for name, p in net.named_parameters() if id(p) not in before}


def _padding_as_numbers(module: nn.Module) -> None:
    """``same`` and ``valid`` pad a 1x1 convolution by nothing; peft's HRA reads the first letter of the word."""
    if isinstance(module, nn.Conv2d) and isinstance(module.padding, str):
        module.padding = (0, 0)


def _tell_maps_from_convolutions(net: nn.Module) -> None:
    """peft's OFT takes any four axes for a convolution's; the linear layers of ConvNeXt read ``B height width D``."""
    from peft.tuners.oft.layer import OFTRotationModule

    for module in net.modules():
        if isinstance(module, OFTRotationModule) and module.kernel_size == (0, 0):
            module.register_forward_pre_hook(_with_a_fifth_axis)
            module.register_forward_hook(_without_a_fifth_axis)


def _with_a_fifth_axis(module: nn.Module, args: tuple) -> tuple:
    return (args[0][None] if args[0].ndim == 4 else args[0], *args[1:])


def _without_a_fifth_axis(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output[0] if output.ndim == 5 else output


class Prompts(nn.Module):
    """Learned tokens that stand before the first real token or patch (VPT-shallow, Jia et al., ECCV 2022)."""

    def __init__(self, count: int, width: int, at: int, device: torch.device):
        super().__init__()
        self.at = at
        self.tokens = nn.Parameter(torch.empty(count, width, device=device).normal_(std=0.02))

    def insert(self, states: Tensor) -> Tensor:
        """Put the prompts into ``states [B N D]``."""
        prompts = self.tokens.to(states.dtype).expand(len(states), -1, -1)
        return torch.cat((states[:, : self.at], prompts, states[:, self.at :]), dim=1)

    def remove(self, states: Tensor) -> Tensor:
        """Take them out again."""
        return torch.cat((states[:, : self.at], states[:, self.at + len(self.tokens) :]), dim=1)


def insert_prompts(net: nn.Module, parts: Anatomy, count: int) -> set[str]:
    """Let ``net`` see ``count`` learned tokens, and nobody outside it: the states come out as if they were not there.

    In a text tower they stand before the first token, in an image tower between class token and patches. Raises
    ``UserError`` for a net without attention, and for one that takes token ids only.
    """
    from transformers import PreTrainedModel

    if not any(block.attention for block in parts.blocks):
        raise UserError(f"prompts: {parts.family} has no attention, so extra tokens would meet nobody")
    first = net.get_submodule(parts.blocks[0].path)
    device = next(first.parameters()).device
    if isinstance(net, PreTrainedModel) and net.main_input_name == "input_ids":
        if "inputs_embeds" not in inspect.signature(net.forward).parameters:
            raise UserError(f"prompts: {parts.family} takes token ids only, so learned tokens cannot be put in front")
        width = next(net.get_input_embeddings().parameters()).shape[1]
        prompts = Prompts(count, width, 0, device)
        net.register_forward_pre_hook(_PromptTokens(prompts), with_kwargs=True)
    else:
        width = next(p.numel() for m in first.modules() if is_norm(m) for p in m.parameters())
        prompts = Prompts(count, width, parts.prefix_tokens, device)
        first.register_forward_pre_hook(_PromptStates(prompts))
    net.add_module("prompts", prompts)
    net.register_forward_hook(_WithoutPrompts(prompts))
    return {"prompts.tokens"}


# --- how -------------------------------------------------------------------------------------------------------------


def _attach(module: nn.Module, adapter: Adapter, place: str) -> None:
    if place == "input":
        module.register_forward_pre_hook(_BeforeBranch(adapter), with_kwargs=True)
    else:
        module.register_forward_hook(_AfterBranch(adapter))


class _BeforeBranch:
    """A hook that is an object, so that copying a tower copies what its hooks point to."""

    def __init__(self, adapter: Adapter):
        self.adapter = adapter

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (self.adapter(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.adapter(kwargs["hidden_states"])}


class _AfterBranch:
    def __init__(self, adapter: Adapter):
        self.adapter = adapter

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.adapter(output[0]), *output[1:])
        return self.adapter(output)


class _PromptTokens:
    """Text: embed the ids ourselves, set the prompts in front and let the mask cover them."""

    def __init__(self, prompts: Prompts):
        self.prompts = prompts

    def __call__(self, net: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        ids, mask = kwargs.pop("input_ids"), kwargs.pop("attention_mask")
        embedded = self.prompts.insert(net.get_input_embeddings()(ids))
        front = mask.new_ones(len(mask), len(self.prompts.tokens))
        return args, {**kwargs, "inputs_embeds": embedded, "attention_mask": torch.cat((front, mask), dim=1)}


class _PromptStates:
    """Images: the states that enter the first block."""

    def __init__(self, prompts: Prompts):
        self.prompts = prompts

    def __call__(self, block: nn.Module, args: tuple) -> tuple:
        return (self.prompts.insert(args[0]), *args[1:])


class _WithoutPrompts:
    def __init__(self, prompts: Prompts):
        self.prompts = prompts

    def __call__(self, net: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self.prompts.remove(output)
        output.last_hidden_state = self.prompts.remove(output.last_hidden_state)
        return output


def _is_map(module: nn.Module, parts: Anatomy, place: str) -> bool:
    """Whether ``B D height width`` flows into (or out of) the module: its first (or last) layer is a convolution."""
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    edge = layers[:1] if place == "input" else layers[-1:]
    return parts.channels_first or any(isinstance(layer, nn.Conv2d) for layer in edge)


def _width(net: nn.Module, path: str, module: nn.Module, place: str) -> int:
    """Channels that flow into (or out of) the module: read from it, or from the nearest weights around it."""
    while True:
        width = _width_in(module) if place == "input" else _width_out(module)
        if width:
            return width
        path = path.rpartition(".")[0]  # an Identity or a Dropout: its neighbours know
        module = net.get_submodule(path)


def _width_in(module: nn.Module) -> int | None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            return part.in_channels
        if isinstance(part, nn.Linear):
            return part.in_features
        if is_norm(part):
            return next(part.parameters()).numel()
    return None


def _width_out(module: nn.Module) -> int | None:
    widths = []
    for part in module.modules():
        if isinstance(part, nn.Linear):
            widths.append(part.out_features)
        elif next(part.children(), None) is None:
            widths += [p.numel() for p in part.parameters() if p.ndim == 1]  # a norm or a layer scale
    return widths[-1] if widths else None


def _keeps_width(block: nn.Module) -> bool:
    convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    if not convolutions or any(isinstance(m, nn.Linear) for m in block.modules()):
        return True
    strides = all(m.stride in (1, (1, 1)) for m in convolutions)
    return strides and convolutions[0].in_channels == convolutions[-1].out_channels


def _start_afresh(block: nn.Module) -> None:
    """Linear, convolution and embedding weights N(0, 0.02), biases zero, norms one: BERT's and ViT's own start."""
    for module in block.modules():
        if is_norm(module):
            for name, p in module.named_parameters(recurse=False):
                nn.init.zeros_(p) if name == "bias" else nn.init.ones_(p)
        else:
            for name, p in module.named_parameters(recurse=False):
                if p.ndim >= 2:
                    nn.init.trunc_normal_(p, std=0.02)
                elif name == "bias":
                    nn.init.zeros_(p)


def _tell_config(net: nn.Module, blocks: int) -> None:
    """``transformers`` models read their depth from their configuration while running."""
    from transformers import PreTrainedModel

    if not isinstance(net, PreTrainedModel):
        return
    config = net.config.to_dict()
    if "num_hidden_layers" in config:
        net.config.num_hidden_layers = blocks
    kinds = config.get("layer_types")
    if kinds:
        net.config.layer_types = (kinds + kinds[-1:] * blocks)[:blocks]


def truncate(net: nn.Module, layer: int) -> None:
    """Keep the first ``layer`` blocks (negative counts from the end); what follows the last block stays.

    Raises ``UserError`` when there are not so many blocks, or when their widths differ.
    """
    parts = anatomy(net)
    container_path = parts.blocks[-1].path.rpartition(".")[0]
    container = net.get_submodule(container_path)
    keep = layer if layer > 0 else len(parts.blocks) + layer
    stack = container if isinstance(container, nn.ModuleList | nn.Sequential) else None
    if stack is None or len(stack) != len(parts.blocks) or parts.channels_first:
        raise UserError(
            f"layer = {layer}: {parts.family} changes width from block to block; only its last layer can be read"
        )
    if not 1 <= keep <= len(parts.blocks):
        raise UserError(
            f"layer = {layer}: {parts.family} has {len(parts.blocks)} blocks; choose 1 to {len(parts.blocks)}"
        )
    del stack[keep:]
    _tell_config(net, keep)


def _peft_config(method: str, targets: list[str], options: dict[str, Any]) -> Any:
    """peft's configuration; where left out, ``rank`` is 8 and ``alpha`` twice the rank (LoHa and LoKr: the rank)."""
    import peft

    rank = options.get("rank", 8)
    lora = {"r": rank, "lora_alpha": 2 * rank}
    kind, spelt, start = {
        "lora": (peft.LoraConfig, {"rank": "r", "alpha": "lora_alpha"}, lora),
        "dora": (peft.LoraConfig, {"rank": "r", "alpha": "lora_alpha"}, {**lora, "use_dora": True}),
        "rslora": (peft.LoraConfig, {"rank": "r", "alpha": "lora_alpha"}, {**lora, "use_rslora": True}),
        "ia3": (peft.IA3Config, {}, {"feedforward_modules": []}),
        "loha": (peft.LoHaConfig, {"rank": "r"}, {"r": rank, "alpha": rank}),
        "lokr": (peft.LoKrConfig, {"rank": "r"}, {"r": rank, "alpha": rank}),
        "oft": (peft.OFTConfig, {"rank": "r"}, {"r": 0, "oft_block_size": 0 if "rank" in options else 4}),
        "hra": (peft.HRAConfig, {"rank": "r"}, {"r": rank}),
    }[method]
    given = {spelt.get(key, key): value for key, value in options.items()}
    try:
        return kind(target_modules=targets, **{**start, **given})
    except TypeError as error:
        raise UserError(f"{method}: peft's {kind.__name__} does not take {sorted(options)} ({error})") from None
