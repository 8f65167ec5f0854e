"""Prompt tuning: learned tokens inside a tower, absent from its output.

Input: a net and its ``ModelStructure``. Output: the names of the new parameters. Note: the tokens are inserted and
removed by forward hooks, so that no base parameter is renamed.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from clasp.models.structure import ModelStructure, is_norm, is_transformers_model
from clasp.models.transformer.bert import BertEncoder
from clasp.types import UserError


def insert_prompts(net: nn.Module, structure: ModelStructure, count: int) -> set[str]:
    """Add ``count`` learned tokens to the input of ``net``; its hidden states are returned without them.

    They are inserted before the first token in a text tower, between class token and patches in an image tower.
    Returns the names of the new parameters. Raises ``UserError`` for a net without attention, for one that accepts
    token ids only, and for one that has prompts already.
    """
    if not any(block.attention for block in structure.blocks):
        raise UserError(f"prompts: {structure.family} has no attention, so extra tokens would have no effect")
    if "prompts" in dict(net.named_children()):
        raise UserError("prompts: given twice; ask for all of them at once, as in prompts(8)")
    first = net.get_submodule(structure.blocks[0].path)
    device = next(first.parameters()).device
    if _takes_token_ids(net):
        if "inputs_embeds" not in inspect.signature(net.forward).parameters:
            raise UserError(
                f"prompts: {structure.family} takes token ids only, so learned tokens cannot be put in front"
            )
        text_net: Any = net
        width = next(text_net.get_input_embeddings().parameters()).shape[1]
        prompts = PromptTokens(count, width, 0, device)
        net.register_forward_pre_hook(_PrependToTokens(prompts), with_kwargs=True)
    else:
        width = next(p.numel() for m in first.modules() if is_norm(m) for p in m.parameters())
        prompts = PromptTokens(count, width, structure.prefix_tokens, device)
        first.register_forward_pre_hook(_InsertIntoStates(prompts))
    net.add_module("prompts", prompts)
    net.register_forward_hook(_RemovePrompts(prompts))
    return {"prompts.tokens"}


def positions_of_prompts(net: nn.Module) -> int:
    """How many positions of a tuned net its prompts take: none where they stand behind the position embedding."""
    prompts = dict(net.named_children()).get("prompts")
    return len(prompts.tokens) if isinstance(prompts, PromptTokens) and _takes_token_ids(net) else 0


class PromptTokens(nn.Module):
    """Learned tokens before the first real token or patch (VPT-shallow, Jia et al., ECCV 2022)."""

    def __init__(self, count: int, width: int, position: int, device: torch.device):
        super().__init__()
        self.position = position
        self.tokens = nn.Parameter(torch.empty(count, width, device=device).normal_(std=0.02))

    def insert(self, states: Tensor) -> Tensor:
        """Insert the prompts into ``states [B N D]``."""
        prompts = self.tokens.to(states.dtype).expand(states.shape[0], -1, -1)
        return torch.cat((states[:, : self.position], prompts, states[:, self.position :]), dim=1)

    def remove(self, states: Tensor) -> Tensor:
        """Remove the prompts from ``states``."""
        return torch.cat((states[:, : self.position], states[:, self.position + len(self.tokens) :]), dim=1)


# --- how -------------------------------------------------------------------------------------------------------------


def _takes_token_ids(net: Any) -> bool:
    return isinstance(net, BertEncoder) or (is_transformers_model(net) and net.main_input_name == "input_ids")


class _PrependToTokens:
    """Text: embed the token ids, prepend the prompts and extend the attention mask."""

    def __init__(self, prompts: PromptTokens):
        self.prompts = prompts

    def __call__(self, net: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        ids, mask = kwargs.pop("input_ids"), kwargs.pop("attention_mask")
        embedded = self.prompts.insert(net.get_input_embeddings()(ids))
        front = mask.new_ones(mask.shape[0], len(self.prompts.tokens))
        return args, {**kwargs, "inputs_embeds": embedded, "attention_mask": torch.cat((front, mask), dim=1)}


class _InsertIntoStates:
    """Images: insert the prompts into the input of the first block."""

    def __init__(self, prompts: PromptTokens):
        self.prompts = prompts

    def __call__(self, block: nn.Module, args: tuple) -> tuple:
        return (self.prompts.insert(args[0]), *args[1:])


class _RemovePrompts:
    def __init__(self, prompts: PromptTokens):
        self.prompts = prompts

    def __call__(self, net: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self.prompts.remove(output)
        output.last_hidden_state = self.prompts.remove(output.last_hidden_state)
        return output
