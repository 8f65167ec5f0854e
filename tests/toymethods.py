"""One table: every method as a recipe writes it, several at once, and the towers that rightly refuse one."""

from __future__ import annotations

from toytowers import NETS

BRANCH = "conv_branch(before=(1,))"
METHODS = (
    "full", "none", "norms", "biases", "attention", "mlp", "last(1)", "adapters", "adapters(place='input')",
    "deep(1)", "deep(1, init='random')", "lora(rank=2)", "lora(rank=2, targets='all')", "prompts(3)", "match('*.1.*')",
    BRANCH,
)  # fmt: skip
OTHER_PEFT = ("dora(rank=2)", "rslora(rank=2)", "ia3", "loha(rank=2)", "lokr(rank=2)", "oft", "hra(rank=2)")
# several of them in one tower, on other blocks or other layers of each
SEVERAL = (
    ("lora(rank=1, blocks=':1')", "lora(rank=3, blocks='1:')"),
    ("lora(rank=2, blocks=':1', targets='all')", "dora(rank=1, blocks='1:', alpha=4)"),
    ("rslora(rank=2, targets='attention')", "ia3(targets='mlp')", "norms(blocks='1:')"),
    ("oft(blocks=':1')", "oft(blocks='1:', rank=2)"),
    ("adapters(reduction=4, blocks=':1')", "adapters(reduction=8, blocks='1:')", "hra(rank=2, blocks='1:')"),
)  # fmt: skip
# what a tower cannot do, and the word its error must contain
CANNOT = {
    ("convnext", "attention"): "matches nothing",
    ("convnext", "prompts(3)"): "no attention",
    ("efficientnet", "attention"): "matches nothing",
    ("efficientnet", "mlp"): "matches nothing",
    ("efficientnet", "adapters(place='input')"): "no known branch input",
    ("efficientnet", "prompts(3)"): "no attention",
    ("efficientnet", "deep(1)"): "changes the width of its input",
    ("efficientnet", "deep(1, init='random')"): "changes the width of its input",
    ("llama", "biases"): "matches nothing",
    ("qwen3", "biases"): "matches nothing",
    ("modernbert", "biases"): "matches nothing",
    ("t5", "biases"): "matches nothing",
    ("clip-text", "prompts(3)"): "takes token ids only",
    **{(name, BRANCH): "our own image nets alone" for name in NETS if name not in ("deit3", "own-image", "own-stem")},
}
