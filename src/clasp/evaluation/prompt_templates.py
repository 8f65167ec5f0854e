"""Named sets of prompt templates: CLIP's 80 for ImageNet, and the seven of them that alone do about as well.

Source: Radford et al., ICML 2021, the notebook ``Prompt_Engineering_for_ImageNet``. Note: the order is that of the
notebook; it does not matter, since the prompts of a class are averaged.
"""

from __future__ import annotations

_CLIP_80 = """
a bad photo of a {}.|a photo of many {}.|a sculpture of a {}.|a photo of the hard to see {}.
a low resolution photo of the {}.|a rendering of a {}.|graffiti of a {}.|a bad photo of the {}.
a cropped photo of the {}.|a tattoo of a {}.|the embroidered {}.|a photo of a hard to see {}.
a bright photo of a {}.|a photo of a clean {}.|a photo of a dirty {}.|a dark photo of the {}.
a drawing of a {}.|a photo of my {}.|the plastic {}.|a photo of the cool {}.
a close-up photo of a {}.|a black and white photo of the {}.|a painting of the {}.|a painting of a {}.
a pixelated photo of the {}.|a sculpture of the {}.|a bright photo of the {}.|a cropped photo of a {}.
a plastic {}.|a photo of the dirty {}.|a jpeg corrupted photo of a {}.|a blurry photo of the {}.
a photo of the {}.|a good photo of the {}.|a rendering of the {}.|a {} in a video game.
a photo of one {}.|a doodle of a {}.|a close-up photo of the {}.|a photo of a {}.
the origami {}.|the {} in a video game.|a sketch of a {}.|a doodle of the {}.
a origami {}.|a low resolution photo of a {}.|the toy {}.|a rendition of the {}.
a photo of the clean {}.|a photo of a large {}.|a rendition of a {}.|a photo of a nice {}.
a photo of a weird {}.|a blurry photo of a {}.|a cartoon {}.|art of a {}.
a sketch of the {}.|a embroidered {}.|a pixelated photo of a {}.|itap of the {}.
a jpeg corrupted photo of the {}.|a good photo of a {}.|a plushie {}.|a photo of the nice {}.
a photo of the small {}.|a photo of the weird {}.|the cartoon {}.|art of the {}.
a drawing of the {}.|a photo of the large {}.|a black and white photo of a {}.|the plushie {}.
a dark photo of a {}.|itap of a {}.|graffiti of the {}.|a toy {}.
itap of my {}.|a photo of a cool {}.|a photo of a small {}.|a tattoo of the {}.
"""
_CLIP_7 = """
itap of a {}.|a bad photo of the {}.|a origami {}.|a photo of the large {}.
a {} in a video game.|art of the {}.|a photo of the small {}.
"""

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    name: tuple(template for line in text.split("\n") for template in line.split("|") if template)
    for name, text in (("clip-80", _CLIP_80), ("clip-7", _CLIP_7))
}
"""Name to templates: ``templates=clip-80``"""
