"""Analyses of runs as tables and heat maps: for the terminal (``clasp analyze``) and for the HTML report.

Input: ``AnalysisRecord``s. Output: ``AnnotatedTable``s and markup. Note: of each image block only the text block with
the most common neighbours is a row, and the baseline is of that combination; ``analysis.json`` has all. Heat maps of
one measure have one scale in a report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from clasp.analysis.layer_similarity import SHUFFLES, LayerSimilarity
from clasp.analysis.record import AnalysisRecord
from clasp.errors import counted
from clasp.report.html_elements import Html, beside, escaped, figure, figure_row, html_table, missing_in
from clasp.report.run_record import RunRecord
from clasp.report.svg_charts import heat_map
from clasp.report.tables import AnnotatedTable

_LAYER_COLUMNS = ("image block", "text block", "mutual k-NN", "shuffled", "CKA", "shuffled")
_MEASURES: Mapping[str, Callable[[LayerSimilarity], float]] = {
    "Mutual k-NN": lambda row: row.mutual_knn,
    "Linear CKA": lambda row: row.cka,
}


def geometry_table(record: AnalysisRecord) -> AnnotatedTable:
    """The measures of the joint space, one a row."""
    geometry = record.geometry
    measures = {
        "mean cosine of pairs": geometry.pair_cosine,
        "mean cosine of non-pairs": geometry.non_pair_cosine,
        "logit scale": record.logit_scale,
        "margin, logits": record.margin,
        "modality gap": geometry.modality_gap,
        "alignment (lower: closer)": geometry.alignment,
        "uniformity of images (lower: more even)": geometry.image_uniformity,
        "uniformity of texts": geometry.text_uniformity,
        "effective rank of images": geometry.image_effective_rank,
        "effective rank of texts": geometry.text_effective_rank,
    }
    rows = [[title, f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"] for title, value in measures.items()]
    return AnnotatedTable(("embedding space", "value"), rows, [describe_analysis(record)])


def layer_table(record: AnalysisRecord) -> AnnotatedTable:
    """For the embeddings and for each image block the text block with the highest mutual k-NN."""
    rows = [_layer_cells(most_similar(record.layers, block)) for block in _blocks(record.layers)]
    note = (
        f"{counted(record.neighbours, 'neighbour')}; shuffled: the same with images and texts paired at random, "
        f"mean of {SHUFFLES}; of each image block the most similar text block"
    )
    return AnnotatedTable(_LAYER_COLUMNS, rows, [note])


def cluster_table(record: AnalysisRecord) -> AnnotatedTable:
    """Whether images and texts fall apart, by block, and whether heads attend alike in both towers."""
    of_blocks = sorted(record.clusters, key=lambda row: row.block)
    rows = [[str(row.block or "embedding"), f"{row.nmi:.3f}", f"{row.nmi_shuffled:.3f}"] for row in of_blocks]
    notes = ["normalised mutual information of two clusters and modality: 1 apart, 0 mixed"]
    if (found := record.attention) is not None:
        for what, value, (low, high) in (
            ("entropy", found.entropy, found.entropy_shuffled),
            ("attention to the own token", found.own_token, found.own_token_shuffled),
        ):
            notes.append(
                f"{found.heads} attention heads, with images and with texts: correlation of their {what} {value:.2f}; "
                f"heads of a layer paired at random: {low:.2f} to {high:.2f}"
            )
    return AnnotatedTable(("block", "NMI of modality", "shuffled"), rows, notes)


def gradient_table(record: AnalysisRecord) -> AnnotatedTable:
    """Whether images and texts ask for the same change of the weights that both towers share, layer by layer."""
    rows = [
        [
            str(row.layer),
            row.part,
            *("–" if value is None else f"{value:+.3f}" for value in (row.cosine, row.cosine_shuffled)),
        ]
        for row in record.gradients
    ]
    notes = [
        "cosine of the gradients of the loss through the image tower and through the text tower: 1 the same update, 0 "
        "unrelated, -1 opposite; shuffled: the same where each image has the caption of another; –: a gradient is zero"
    ]
    return AnnotatedTable(("layer", "shared weights", "cosine", "shuffled"), rows, notes)


def describe_analysis(record: AnalysisRecord) -> str:
    """The pairs of an analysis, and its time."""
    language = f" in {record.language}" if record.language else ""
    reading = "".join(f", {name}={value}" for name, value in record.reading.items())
    return f"{record.pairs:,} pairs of {record.data}{language}{reading}, {record.seconds:,.1f} s"


def most_similar(layers: Sequence[LayerSimilarity], image_block: int) -> LayerSimilarity:
    """The row of an image block with the highest mutual k-NN."""
    return max((row for row in layers if row.image_block == image_block), key=lambda row: row.mutual_knn)


def analysis_blocks(records: Sequence[RunRecord]) -> list[Html]:
    """The section of the HTML report."""
    blocks = []
    analyses = [analysis for record in records for analysis in record.analyses]
    for record in records:
        for analysis in record.analyses:
            blocks.append(Html(f"<h3>{escaped(f'{record.label}: {describe_analysis(analysis)}')}</h3>"))
            tables = [html_table("Embedding space", replace(geometry_table(analysis), notes=[]))]  # it is the heading
            tables.append(html_table("Similarity of the towers' layers", layer_table(analysis)))
            if analysis.clusters:
                tables.append(html_table("Images and texts as clusters", cluster_table(analysis)))
            if analysis.gradients:
                tables.append(html_table("Gradients on shared weights", gradient_table(analysis)))
            blocks += [beside(tables), *_heat_maps(analysis, analyses)]
    lacking = [record.label for record in records if not record.analyses]
    return [*blocks, missing_in(lacking, "not analysed (clasp analyze RUN data=…).")]


def _heat_maps(record: AnalysisRecord, shown: Sequence[AnalysisRecord]) -> list[Html]:
    """The maps of an analysis, each on the scale of its measure in all analyses that are ``shown``."""
    by_block = {(row.image_block, row.text_block): row for row in _combinations(record)}
    image, text = (sorted({blocks[side] for blocks in by_block}) for side in (0, 1))
    if not by_block:
        return []
    figures = []
    for title, measure in _MEASURES.items():
        values = [[measure(by_block[one, other]) for other in text] for one in image]
        best = max(max(line) for line in values)
        highest = max(measure(row) for each in shown for row in _combinations(each))
        told = f"{title} of every image block with every text block; highest {best:.3f}"
        drawing = heat_map(values, "text block", "image block", told, highest)
        scale = f"0 to {highest:.3f} (full colour)" + (", the scale of all its maps here" if len(shown) > 1 else "")
        figures.append(figure(f"{title}: {scale}", drawing))
    return [figure_row(figures)]


def _combinations(record: AnalysisRecord) -> list[LayerSimilarity]:
    """The rows of blocks; row 0 is that of the embeddings."""
    return [row for row in record.layers if row.image_block]


def _blocks(layers: Sequence[LayerSimilarity]) -> list[int]:
    return sorted({row.image_block for row in layers})


def _layer_cells(row: LayerSimilarity) -> list[str]:
    blocks = [str(row.image_block), str(row.text_block)] if row.image_block else ["embedding", "embedding"]
    return [*blocks, *(f"{v:.3f}" for v in (row.mutual_knn, row.mutual_knn_shuffled, row.cka, row.cka_shuffled))]
