"""One table: every method as a recipe writes it, and the towers that rightly refuse it."""

from __future__ import annotations

METHODS = (
    "full", "none", "norms", "biases", "attention", "mlp", "last(1)", "adapters", "adapters(place='input')",
    "deep(1)", "deep(1, init='random')", "lora(rank=2)", "lora(rank=2, targets='all')", "prompts(3)", "match('*.1.*')",
)  # fmt: skip
OTHER_PEFT = ("dora(rank=2)", "rslora(rank=2)", "ia3", "loha(rank=2)", "lokr(rank=2)", "oft", "hra(rank=2)")
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
}
