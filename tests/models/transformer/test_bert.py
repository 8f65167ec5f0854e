"""The BERT of packaged text towers: bitwise ``transformers``' model, in output, gradients and dropout."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
import transformers as hf

from clasp.models.transformer.bert import BertEncoder, BertEncoderSettings

SETTINGS = BertEncoderSettings(
    vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, pad_token_id=1
)


def _pair() -> tuple[BertEncoder, hf.BertModel]:
    torch.manual_seed(0)
    theirs = hf.BertModel(hf.BertConfig(**asdict(SETTINGS)), add_pooling_layer=False)
    ours = BertEncoder(SETTINGS)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _inputs(*, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, 64, (5, 9), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([9, 4, 7, 9, 2] if padded else [9] * 5)
    mask = torch.arange(9) < lengths[:, None]
    return ids.masked_fill(~mask, 1), mask.long()


def test_names_are_those_of_transformers():
    ours, theirs = _pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "dropout"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
def test_output_and_gradients_are_those_of_transformers(dtype, padded, training):
    ids, mask = _inputs(padded=padded)
    found = []
    for net in _pair():
        net.train(training)
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            states = net(input_ids=ids, attention_mask=mask).last_hidden_state
        (states.float() * torch.linspace(-1, 1, 48)).square().sum().backward()
        found.append((states, {name: p.grad for name, p in net.named_parameters()}))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert torch.equal(ours, theirs)
    if dtype == torch.float32:
        assert all(torch.equal(our_gradients[name], gradient) for name, gradient in their_gradients.items())
    else:  # queries, keys and values share one cast of their input, so its gradient is summed in bfloat16
        one, other = (torch.cat([g.flatten() for g in each.values()]) for each in (our_gradients, their_gradients))
        assert our_gradients.keys() == their_gradients.keys()
        assert (one - other).norm() <= 0.01 * other.norm()


def test_token_embeddings_in_place_of_ids():
    ours, theirs = _pair()
    ids, mask = _inputs(padded=True)
    embedded = ours.get_input_embeddings()(ids)
    alone = ours.eval()(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
    assert torch.equal(alone, ours(input_ids=ids, attention_mask=mask).last_hidden_state)
    assert torch.equal(alone, theirs.eval()(inputs_embeds=embedded, attention_mask=mask).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
def test_inference_mode_changes_no_bit(dtype):
    net, (ids, mask) = _pair()[0].eval().requires_grad_(False), _inputs(padded=True)
    found = []
    for mode in (torch.no_grad, torch.inference_mode):  # the second computes GELU in place
        with mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found.append(net(input_ids=ids, attention_mask=mask).last_hidden_state)
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:.*jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_net_takes_other_batches_and_lengths():
    """As the graphs that ``clasp export --to onnx`` traces."""
    net, (ids, mask) = _pair()[0].eval().requires_grad_(False), _inputs(padded=True)

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return net(input_ids=ids, attention_mask=mask).last_hidden_state

    with torch.no_grad():
        traced = torch.jit.trace(run, (ids, mask), check_trace=False)
        for rows, columns in ((2, 9), (5, 4), (1, 1)):
            some = ids[:rows, :columns], mask[:rows, :columns]
            assert torch.equal(traced(*some), run(*some))
