"""LoRA and the other methods of peft: wrapped linear layers of a tower.

Input: a net and the paths of its layers. Output: the names of the new parameters, which are peft's
(``…q_proj.lora_A.default.weight``); a wrapped base weight is ``…q_proj.base_layer.weight``. All methods use one adapter
name of peft, so that several methods, on different layers, have these names. ``PEFT_METHODS`` has a row for each.
Also: initialisation of LoRA's A from the gradient of the wrapped weight. Note: the only module that imports peft.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clasp.models.frozen_casts import is_plain_low_rank
from clasp.models.low_rank_forward import join_low_rank_update
from clasp.types import UserError

LORA_INITS = ("random", "gradient")
_PEFT_ADAPTER_NAME = "default"  # peft's default adapter name

WeightPath = Literal["from zero", "constant", "from one", "nonlinear"]
"""How an added parameter is interpolated between the base (0) and the tuned tower (1): linearly from zero or from one,
held constant, or not at all, since the tower's weights are not linear in it"""


@dataclass(frozen=True, slots=True)
class PeftMethod:
    """A row of ``PEFT_METHODS``: peft's configuration class, and the properties of the method."""

    config: str
    """Name of the class in peft"""
    defaults: Callable[[int | None], dict[str, Any]]
    """Maps the rank of a recipe, or ``None``, to default options under peft's names"""
    added_parameters: Mapping[str, WeightPath]
    """See ``TuningMethod.added_parameters``"""
    renamed_options: Mapping[str, str] = field(default_factory=lambda: {"rank": "r"})
    """Option names of the papers, to peft's names"""
    gradient_init: bool = False
    """Whether it adds a low-rank update B A whose A can be initialised from the gradient (``init="gradient"``)"""
    highest_rank: Callable[[int, int], int] = min
    """Of a layer with so many outputs and inputs: beyond it, the method writes no more updates than at it"""
    finish: Callable[[Iterable[nn.Module]], None] | None = None
    """Called with the wrapped layers after injection"""


def inject_peft(net: nn.Module, method: str, targets: list[str], options: dict[str, Any]) -> set[str]:
    """Wrap the linear layers ``targets`` with a peft method; returns the names of the parameters it added.

    ``rank`` and ``alpha`` are named as in the papers and are renamed for peft; other options are passed unchanged.
    Raises ``UserError`` for an option that the method does not have, for a rank above that of all layers, and for
    layers that peft cannot wrap.
    """
    row = PEFT_METHODS[method]
    _require_low_rank(net, method, targets, options)
    before = {id(p) for p in net.parameters()}
    config = _peft_config(method, targets, options)
    from peft import inject_adapter_in_model

    for path in targets:
        _make_padding_numeric(net.get_submodule(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of merging and saving, which clasp implements
        try:
            inject_adapter_in_model(config, net, _PEFT_ADAPTER_NAME)
        except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"tuning {method}: peft cannot wrap the layers of {type(net).__name__} ({reason}); choose other "
                "targets or another method"
            ) from error
    for path in targets:
        wrapper = net.get_submodule(path)
        _keep_attributes(wrapper)
        if is_plain_low_rank(wrapper):
            # peft would cast inputs to float32 and autocast back to bfloat16: the same numbers, with two copies
            vars(wrapper)["cast_input_dtype_enabled"] = False
            join_low_rank_update(wrapper, _PEFT_ADAPTER_NAME)
    if row.finish is not None:
        row.finish(net.get_submodule(path) for path in targets)
    return {name for name, p in net.named_parameters() if id(p) not in before}


def wrapped_layers(net: nn.Module) -> set[str]:
    """Paths of the layers that a peft method has wrapped."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path for path, module in net.named_modules() if isinstance(module, BaseTunerLayer)}


def fold_wrapped_layers(net: nn.Module) -> list[str]:
    """Replace each layer that a peft method has wrapped by a plain one with the update added to its weight; returns
    their paths.

    The output is the same to rounding. Weights are copied first, since another tower may share them. For inference
    only: the parameters of the method are gone.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    paths = sorted(wrapped_layers(net))
    for path in paths:
        wrapper = net.get_submodule(path)
        assert isinstance(wrapper, BaseTunerLayer)
        wrapper.add_module("base_layer", copy.deepcopy(wrapper.get_base_layer()))
        wrapper.merge()
        owner, _, name = path.rpartition(".")
        setattr(net.get_submodule(owner), name, wrapper.get_base_layer())
    return paths


def wrapped_weight_name(path: str) -> str:
    """The name of the base weight in the wrapped layer ``path``."""
    return f"{path}.base_layer.weight"


@torch.no_grad()
def initialize_lora_from_gradient(net: nn.Module, path: str, gradient: Float[Tensor, "out in *ones"]) -> None:
    """Initialise A of the low-rank update at ``path`` from the gradient of the weight that it updates.

    With B = 0, the first step changes B by the gradient times A transposed, hence the weight by the gradient projected
    onto the row space of A. The best rank-r rows are the top right singular vectors of the gradient; they are scaled to
    the root mean square norm of the rows of A at random initialisation. After LoRA-GA (Wang, Yu and Li, NeurIPS 2024,
    section 3, gradient approximation), which also initialises B from the left singular vectors and subtracts the
    product from the base. Ours does not: base weights are unchanged bit by bit, and so is the initial model.
    ``gradient`` is that of a linear layer or a 1x1 convolution; rows of A beyond the number of singular vectors keep
    their random initialisation.
    """
    lora_a = net.get_parameter(f"{path}.lora_A.{_PEFT_ADAPTER_NAME}.weight")
    directions = _top_right_singular_vectors(gradient.flatten(1), len(lora_a))
    rows = lora_a[: len(directions)]
    row_norm = rows.norm() / len(directions) ** 0.5
    rows.copy_((row_norm * directions.to(lora_a.dtype)).view_as(rows))


# --- how -------------------------------------------------------------------------------------------------------------


def _require_low_rank(net: nn.Module, method: str, targets: Iterable[str], options: Mapping[str, Any]) -> None:
    """Raises ``UserError`` for a rank, or a size of blocks, above that of every layer: peft would allocate it, on a CPU
    for a net on the meta device too, or reduce it in silence. In a narrower layer a higher one adds nothing."""
    shapes = [net.get_submodule(path).get_parameter("weight").shape for path in targets]
    limit = max(PEFT_METHODS[method].highest_rank(shape[0], shape[1]) for shape in shapes)
    pattern = options.get("rank_pattern")
    asked = {name: options.get(name) for name in _RANKS} | (dict(pattern) if isinstance(pattern, Mapping) else {})
    for name, value in asked.items():
        if isinstance(value, int) and value > limit:
            raise UserError(
                f"tuning {method}: {name} = {value} is above the rank of every layer of {type(net).__name__} that it "
                f"wraps; at most {limit}"
            )


def _make_padding_numeric(module: nn.Module) -> None:
    """``same`` and ``valid`` are padding 0 for a 1x1 convolution; peft's HRA expects numbers."""
    if isinstance(module, nn.Conv2d) and isinstance(module.padding, str):
        module.padding = (0, 0)


def _keep_attributes(wrapper: nn.Module) -> None:
    """Copy the layer's attributes to its wrapper: MobileNetV2 reads the stride of its convolutions to pad."""
    base = wrapper.get_submodule("base_layer")
    existing = {*vars(wrapper), *dir(type(wrapper))}
    missing = {name: value for name, value in vars(base).items() if not name.startswith("_") and name not in existing}
    vars(wrapper).update(missing)


def _top_right_singular_vectors(matrix: Float[Tensor, "out in"], count: int) -> Float[Tensor, "rows in"]:
    """The right singular vectors of the ``count`` largest singular values, as rows; fewer where the rank is smaller.

    By the full SVD (768 x 768: a third of a second on one core), since a randomised one would use random numbers.
    """
    return torch.linalg.svd(matrix.float(), full_matrices=False).Vh[:count]


def _fix_oft_for_channels_last(layers: Iterable[nn.Module]) -> None:
    """peft's OFT treats 4-D inputs as a convolution's; linear layers of ConvNeXt have inputs ``[B height width D]``."""
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
_RANKS = ("rank", "r", "oft_block_size")


def _lora(*, added: Mapping[str, WeightPath] = {}, **options: Any) -> PeftMethod:
    """A low-rank update B A; ``alpha`` is twice the rank by default."""

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
    # it also learns a magnitude vector, in which the weight is not linear
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
        highest_rank=lambda out, inside: inside,
        finish=_fix_oft_for_channels_last,
    ),
    "hra": PeftMethod(
        "HRAConfig",
        lambda rank: {"r": rank or _DEFAULT_RANK},
        {"*.hra_u.*": "nonlinear"},
        highest_rank=lambda out, inside: inside,
    ),
}
