"""BERT under the parameter names of ``transformers``, for packaged text towers: importing that library takes seconds.

Input: token ids, or token embeddings, with an attention mask. Output: hidden states. Note: output and gradients are
bitwise those of ``transformers``' ``BertModel`` without pooling layer, dropout included, so a delta or a recorded
weight hash fits either; under autocast the gradients differ within rounding, since queries, keys and values share one
cast of their input. Unlike ``TextTransformer``, which also runs a converted BERT, it keeps query, key and value
apart and its token types as a table, as the checkpoints do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clasp.models.low_rank_forward import project_together
from clasp.models.packed_weights import product
from clasp.models.plain_attention import attend_to_all
from clasp.models.transformer.blocks import LayerNorm, add_rounded_to, cast_for_products, gelu_of
from clasp.models.transformer.encoders import EncoderOutput
from clasp.models.transformer.packing import Packing, pack_rows


@dataclass(frozen=True, slots=True)
class BertEncoderSettings:
    """Architecture; fields and defaults are those of ``transformers``' ``BertConfig``."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    pad_token_id: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1


class BertEncoder(nn.Module):
    """Token ids to the states of every token (Devlin et al., NAACL 2019): post-norm blocks, exact GELU, no pooling.

    Its weights are to be loaded: the embeddings are not initialised.
    """

    def __init__(self, settings: BertEncoderSettings):
        super().__init__()
        self.settings = settings
        self.embeddings = _Embeddings(settings)
        self.encoder = _Blocks(settings)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding; ``inputs_embeds`` of ``forward`` are its output."""
        return self.embeddings.word_embeddings

    def forward(
        self,
        input_ids: Int[Tensor, "B N"] | None = None,
        attention_mask: Int[Tensor, "B N"] | Bool[Tensor, "B N"] | None = None,
        inputs_embeds: Float[Tensor, "B N D"] | None = None,
    ) -> EncoderOutput:
        """States of every token, from token ids or from token embeddings; no mask: every token is real."""
        embedded = inputs_embeds
        if embedded is None:
            assert input_ids is not None, "token ids or token embeddings"
            embedded = self.embeddings.word_embeddings(input_ids)
        positions = torch.arange(embedded.shape[1], device=embedded.device)[None]
        return EncoderOutput(self._run_blocks(embedded, positions, _pair_mask(attention_mask)))

    def forward_packed(
        self, input_ids: Int[Tensor, "B N"], attention_mask: Int[Tensor, "B N"] | Bool[Tensor, "B N"]
    ) -> Float[Tensor, "B N D"]:
        """The states of ``forward`` to rounding, computed without padding; zeros where a token is padding.

        Hooks on blocks see all captions as one row; those on the net are not called.
        """
        packing = pack_rows(attention_mask)
        embedded = self.get_input_embeddings()(packing.pack(input_ids))
        return packing.unpack(self._run_blocks(embedded, packing.columns[None], packing), attention_mask)

    def _run_blocks(
        self,
        embedded: Float[Tensor, "B N D"],
        positions: Int[Tensor, "1 N"],
        mask: Bool[Tensor, "B 1 N N"] | Packing | None,
    ) -> Float[Tensor, "B N D"]:
        states = self.embeddings(embedded, positions)
        for block in self.encoder.layer:
            states = block(states, mask)
        return states


def _pair_mask(mask: Tensor | None) -> Bool[Tensor, "B 1 N N"] | None:
    """Which keys each query attends to; ``None`` where no token is padding, for which kernels are faster."""
    if mask is None or bool(mask.all()):
        return None
    count = mask.shape[1]
    return mask.bool()[:, None, None].expand(-1, 1, count, count)


class _Embeddings(nn.Module):
    """Adds the embeddings of token type 0 and of the positions to token embeddings, and normalises."""

    def __init__(self, settings: BertEncoderSettings):
        super().__init__()
        width = settings.hidden_size
        self.word_embeddings = _table(settings.vocab_size, width, padding_idx=settings.pad_token_id)
        self.position_embeddings = _table(settings.max_position_embeddings, width)
        self.token_type_embeddings = _table(settings.type_vocab_size, width)
        self.LayerNorm = LayerNorm(width, eps=settings.layer_norm_eps)
        self.dropout = nn.Dropout(settings.hidden_dropout_prob)

    def forward(self, embedded: Float[Tensor, "B N D"], positions: Int[Tensor, "1 N"]) -> Float[Tensor, "B N D"]:
        # looked up for each token, not broadcast from one row: so are the gradient's sums; ``len`` would be a constant
        # of an exported graph
        types = self.token_type_embeddings(torch.zeros_like(positions).expand(embedded.shape[0], -1))
        return self.dropout(self.LayerNorm(embedded + types + self.position_embeddings(positions)))


def _table(rows: int, width: int, *, padding_idx: int | None = None) -> nn.Embedding:
    """An embedding that is not initialised: a random draw on the meta device imports torch's compiler, in a second."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False, padding_idx=padding_idx)


class _Blocks(nn.Module):
    def __init__(self, settings: BertEncoderSettings):
        super().__init__()
        self.layer = nn.ModuleList(_Block(settings) for _ in range(settings.num_hidden_layers))


class _Block(nn.Module):
    """Attention, then the feed-forward part, each followed by the residual sum and a norm."""

    def __init__(self, settings: BertEncoderSettings):
        super().__init__()
        self.attention = _Attention(settings)
        self.intermediate = _Intermediate(settings)
        self.output = _Output(settings.intermediate_size, settings)

    def forward(
        self, states: Float[Tensor, "B N D"], mask: Bool[Tensor, "B 1 N N"] | Packing | None
    ) -> Float[Tensor, "B N D"]:
        states = self.attention(states, mask)
        return self.output(self.intermediate(states), states)


class _Attention(nn.Module):
    def __init__(self, settings: BertEncoderSettings):
        super().__init__()
        self.self = _SelfAttention(settings)
        self.output = _Output(settings.hidden_size, settings)

    def forward(
        self, states: Float[Tensor, "B N D"], mask: Bool[Tensor, "B 1 N N"] | Packing | None
    ) -> Float[Tensor, "B N D"]:
        return self.output(self.self(states, mask), states)


class _SelfAttention(nn.Module):
    """Multi-head self-attention without its output projection."""

    def __init__(self, settings: BertEncoderSettings):
        super().__init__()
        width = settings.hidden_size
        self.heads = settings.num_attention_heads
        self.query: nn.Module = nn.Linear(width, width)
        self.key: nn.Module = nn.Linear(width, width)
        self.value: nn.Module = nn.Linear(width, width)
        self.dropout = nn.Dropout(settings.attention_probs_dropout_prob)

    def forward(
        self, states: Float[Tensor, "B N D"], mask: Bool[Tensor, "B 1 N N"] | Packing | None
    ) -> Float[Tensor, "B N D"]:
        states = cast_for_products(states)
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in project_together(states, (self.query, self.key, self.value))
        )
        dropout = self.dropout.p if self.training else 0.0
        if isinstance(mask, Packing):
            assert not dropout, "captions are packed without gradients only"
            attended = mask.attend(q, k, v)
        elif mask is None and not dropout:
            attended = attend_to_all(q, k, v)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return attended.transpose(1, 2).flatten(2)


class _Intermediate(nn.Module):
    def __init__(self, settings: BertEncoderSettings):
        super().__init__()
        self.dense: nn.Module = nn.Linear(settings.hidden_size, settings.intermediate_size)

    def forward(self, states: Float[Tensor, "B N D"]) -> Float[Tensor, "B N hidden"]:
        return gelu_of(product(self.dense, states))


class _Output(nn.Module):
    """The linear layer at the end of a branch, with the residual sum and the norm."""

    def __init__(self, inputs: int, settings: BertEncoderSettings):
        super().__init__()
        self.dense: nn.Module = nn.Linear(inputs, settings.hidden_size)
        self.LayerNorm = LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)
        self.dropout = nn.Dropout(settings.hidden_dropout_prob)

    def forward(self, branch: Float[Tensor, "B N _"], residual: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.LayerNorm(add_rounded_to(self.dropout(product(self.dense, branch)), residual))
