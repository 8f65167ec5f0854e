"""Low-rank updates and the other methods of peft: linear layers of a tower, wrapped.

In go a net and the paths of its layers, out come the names of the parameters that are new; they appear as peft gives
them (``…q_proj.lora_A.default.weight``), and the wrapped base as ``…q_proj.base_layer.weight``. Every method goes in
under peft's one adapter name, so several of them, on different layers, keep those names. ``PEFT_METHODS`` has a row for
each. Here too: a start of LoRA's A from the gradient of the wrapped weight. The only module that imports peft.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clasp.types import UserError

LORA_INITS = ("random", "gradient")
_PEFT_ADAPTER_NAME = "default"  # peft's own name for what it puts in

WeightPath = Literal["from zero", "constant", "from one", "nonlinear"]
"""How a parameter that a method adds moves on the straight way from the base to the tuned tower: from zero or from one
to itself, not at all, or there is no such way since the tower's weights are not linear in it"""


@dataclass(frozen=True, slots=True)
class PeftMethod:
    """A row of ``PEFT_METHODS``: peft's configuration for it, and what is special about it."""

    config: str
    """Name of the class in peft"""
    defaults: Callable[[int | None], dict[str, Any]]
    """The rank that a recipe gives, or ``None``, to options under peft's names"""
    added_parameters: Mapping[str, WeightPath]
    """As ``TuningMethod`` has them"""
    renamed_options: Mapping[str, str] = field(default_factory=lambda: {"rank": "r"})
    """Options as papers spell them, to peft's names"""
    gradient_init: bool = False
    """Whether it adds an update B A in which A can start from the gradient (``init="gradient"``)"""
    finish: Callable[[Iterable[nn.Module]], None] | None = None
    """What is done to the wrapped layers at the end"""


def inject_peft(net: nn.Module, method: str, targets: list[str], options: dict[str, Any]) -> set[str]:
    """Wrap the linear layers ``targets`` with a peft method; returns the names of the parameters it added.

    ``rank`` and ``alpha`` are spelt as in the papers and handed to peft under its names; other options go to peft as
    they are. Raises ``UserError`` for an option that the method does not have, and for layers that peft refuses.
    """
    before = {id(p) for p in net.parameters()}
    row = PEFT_METHODS[method]
    config = _peft_config(method, targets, options)
    from peft import inject_adapter_in_model

    for path in targets:
        _make_padding_numeric(net.get_submodule(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of merging and saving, which clasp does itself
        try:
            inject_adapter_in_model(config, net, _PEFT_ADAPTER_NAME)
        except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"tuning {method}: peft cannot wrap the layers of {type(net).__name__} ({reason}); choose other "
                "targets or another method"
            ) from error
    for path in targets:
        _keep_attributes(net.get_submodule(path))
    if row.finish is not None:
        row.finish(net.get_submodule(path) for path in targets)
    return {name for name, p in net.named_parameters() if id(p) not in before}


def wrapped_layers(net: nn.Module) -> set[str]:
    """Paths of the layers that a peft method has wrapped."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path for path, module in net.named_modules() if isinstance(module, BaseTunerLayer)}


def wrapped_weight_name(path: str) -> str:
    """The name of the base's weight in the wrapped layer ``path``."""
    return f"{path}.base_layer.weight"


@torch.no_grad()
def initialize_lora_from_gradient(net: nn.Module, path: str, gradient: Float[Tensor, "out in *ones"]) -> None:
    """Let A of the low-rank update at ``path`` start along the gradient of the weight that it updates.

    With B = 0 the first step moves B by the gradient times A transposed, hence the weight by the gradient projected
    onto the rows of A. The rows that lose least of it are its top right singular vectors; they come in the length that
    A was drawn with. After LoRA-GA (Wang, Yu and Li, NeurIPS 2024, section 3, gradient approximation), where B starts
    along the left singular vectors too and the product is subtracted from the base. Ours does not: the base stays the
    weights that a delta stands on, bit by bit, and the model begins as what it was. ``gradient`` is of a linear layer
    or a 1x1 convolution; a rank above its own keeps the rest of A as it was drawn.
    """
    start = net.get_parameter(f"{path}.lora_A.{_PEFT_ADAPTER_NAME}.weight")
    directions = _top_right_singular_vectors(gradient.flatten(1), len(start))
    drawn = start[: len(directions)]
    length = drawn.norm() / len(directions) ** 0.5
    drawn.copy_((length * directions.to(start.dtype)).view_as(drawn))


# --- how -------------------------------------------------------------------------------------------------------------


def _make_padding_numeric(module: nn.Module) -> None:
    """``same`` and ``valid`` pad a 1x1 convolution by nothing; peft's HRA reads the first letter of the word."""
    if isinstance(module, nn.Conv2d) and isinstance(module.padding, str):
        module.padding = (0, 0)


def _keep_attributes(wrapper: nn.Module) -> None:
    """What a net reads of a layer is there in its wrapper too: MobileNetV2 pads by the stride of its convolutions."""
    base = wrapper.get_submodule("base_layer")
    known = {*vars(wrapper), *dir(type(wrapper))}
    facts = {name: value for name, value in vars(base).items() if not name.startswith("_") and name not in known}
    vars(wrapper).update(facts)


def _top_right_singular_vectors(matrix: Float[Tensor, "out in"], count: int) -> Float[Tensor, "rows in"]:
    """At most ``count`` of them, as rows, those of the largest singular values first; fewer where there are fewer.

    By the whole decomposition (768 x 768: a third of a second on one core), since a randomised one would draw.
    """
    return torch.linalg.svd(matrix.float(), full_matrices=False).Vh[:count]


def _fix_oft_for_channels_last(layers: Iterable[nn.Module]) -> None:
    """peft's OFT takes any four axes for a convolution's; the linear layers of ConvNeXt read ``B height width D``."""
    from peft.tuners.oft.layer import OFTRotationModule

    for module in chain.from_iterable(layer.modules() for layer in layers):
        if isinstance(module, OFTRotationModule) and module.kernel_size == (0, 0):
            module.register_forward_pre_hook(_add_axis)
            module.register_forward_hook(_remove_axis)


def _add_axis(module: nn.Module, args: tuple) -> tuple:
    return (args[0][None] if args[0].ndim == 4 else args[0], *args[1:])


def _remove_axis(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output[0] if output.ndim == 5 else output


def _peft_config(method: str, targets: list[str], options: dict[str, Any]) -> Any:
    import peft

    row = PEFT_METHODS[method]
    kind = vars(peft)[row.config]
    given = {row.renamed_options.get(key, key): value for key, value in options.items()}
    try:
        return kind(target_modules=targets, **{**row.defaults(options.get("rank")), **given})
    except TypeError as error:
        raise UserError(f"{method}: peft's {kind.__name__} does not take {sorted(options)} ({error})") from None


# --- the table -------------------------------------------------------------------------------------------------------

_DEFAULT_RANK = 8


def _lora(*, added: Mapping[str, WeightPath] = {}, **options: Any) -> PeftMethod:
    """An update B A; where left out, ``alpha`` is twice the rank."""

    def defaults(rank: int | None) -> dict[str, Any]:
        r = rank or _DEFAULT_RANK
        return {"r": r, "lora_alpha": 2 * r, **options}

    return PeftMethod(
        "LoraConfig",
        defaults,
        {"*.lora_A.*": "constant", "*.lora_B.*": "from zero", **added},
        renamed_options={"rank": "r", "alpha": "lora_alpha"},
        gradient_init=True,
    )


def _rank_and_alpha(rank: int | None) -> dict[str, Any]:
    return {"r": rank or _DEFAULT_RANK, "alpha": rank or _DEFAULT_RANK}


PEFT_METHODS: dict[str, PeftMethod] = {
    "lora": _lora(),
    # it also changes the lengths of columns, in which the weight is not linear
    "dora": _lora(use_dora=True, added={"*.lora_magnitude_vector.*": "nonlinear"}),
    "rslora": _lora(use_rslora=True),
    "ia3": PeftMethod(
        "IA3Config", lambda rank: {"feedforward_modules": []}, {"*.ia3_l.*": "from one"}, renamed_options={}
    ),
    "loha": PeftMethod(
        "LoHaConfig",
        _rank_and_alpha,
        {"*.hada_w1_a.*": "from zero", **dict.fromkeys(("*.hada_w1_b.*", "*.hada_w2_[ab].*"), "constant")},
    ),
    "lokr": PeftMethod(
        "LoKrConfig",
        _rank_and_alpha,
        {
            **dict.fromkeys(("*.lokr_w1.*", "*.lokr_w1_a.*"), "from zero"),
            **dict.fromkeys(("*.lokr_w1_b.*", "*.lokr_w2.*", "*.lokr_w2_[ab].*", "*.lokr_t2.*"), "constant"),
        },
    ),
    "oft": PeftMethod(
        "OFTConfig",
        lambda rank: {"r": 0, "oft_block_size": 4 if rank is None else 0},
        {"*.oft_R.*": "nonlinear"},
        finish=_fix_oft_for_channels_last,
    ),
    "hra": PeftMethod("HRAConfig", lambda rank: {"r": rank or _DEFAULT_RANK}, {"*.hra_u.*": "nonlinear"}),
}
