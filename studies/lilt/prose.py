"""The texts of the pages that contain no results: the claims, and the methods of their studies."""

TITLES = {
    "claim1": "Claim 1: less than 7 % of the parameters is enough",
    "claim2": "Claim 2: efficient tuning keeps what the towers knew",
    "claim3": "Claim 3: it scales with data and with the model",
    "claim4": "Claim 4: languages that are poor in data",
    "claim5": "Claim 5: the larger model for the same budget",
    "epochs": "Over epochs: where the curves flatten",
}

SAYS = {
    "claim1": """LilT (Khan & Fu, ICLR 2023): updating less than 7 % of the parameters does as well as full training,
and less than 1 % (norms, biases) reaches three quarters of it.""",
    "claim2": """LilT (Khan & Fu, ICLR 2023): what the towers knew before the alignment is kept better when few
parameters are updated.""",
    "claim3": """LilT (Khan & Fu, ICLR 2023): efficient tuning goes on gaining with more pairs and with larger towers,
as full training does.""",
    "claim4": """LilT (Khan & Fu, ICLR 2023): with a multilingual text tower, efficient tuning does better than full
training in languages that are poor in data, and in those that are never trained.""",
    "claim5": """LilT (Khan & Fu, ICLR 2023): for the same budget of arithmetic or memory, a larger model tuned
efficiently is better than a smaller one trained in full.""",
    "epochs": """LilT (Khan & Fu, ICLR 2023) trains for 15 epochs. Asked here: how much further efficient tuning and
full training come with more of them, and where either stops gaining.""",
}

PHOTOS = """Towers: DINOv2 ViT-S/14 (`pip:dinov2-small-focus`) at 56 px and MiniLM-L6 (`pip:minilm-l6`); one epoch,
batches of 64, float32. Pairs: photos of every second class of Tiny-ImageNet (80 classes) with template captions;
photos of one class are no negatives of each other. Heads start in closed form, the same for every row, from about
1,000 training photos that never train, and then train with the towers at 1e-4; the row "heads, closed form of all
pairs" has its closed form from its own pairs as well, and no steps to speak of. What trains in the towers has a
learning rate of its own for each row, chosen with seed 0 by the likelihood of the right class on {held} other
training photos; all that were tried are below. Quality is zero-shot top-5 over the 80 classes on 1,200 test photos:
it moves more than top-1 at this size. Each seed draws its own training photos, {pairs} where nothing else is said."""

PHOTOS_8000 = """Towers: DINOv2 ViT-S/14 (`pip:dinov2-small-focus`) at 56 px and MiniLM-L6 (`pip:minilm-l6`); three
epochs, batches of 128, bfloat16. Pairs: {pairs} photos of the 160 classes of Tiny-ImageNet with template captions;
photos of one class are no negatives of each other. Heads start in closed form from the last layers of the untouched
towers over the pairs that train, the same for every row of a seed, and train at 1e-3. The two rows "closed form" take
no step: from the last layers, and from the pooled states of all layers. What trains in the towers has a learning rate
of its own for each row (in the row "heads" the heads), chosen with seed 0 by the likelihood of the right class on
{held} other training photos; all that were tried are below. Quality is zero-shot over the 160 classes, on 2,400 test
photos. Seeds change order, crops and what is drawn; the pairs of the largest runs are the same."""

NAMES = """Text tower: multilingual-e5-small. The image tower (EfficientNet-Lite0, 128 px) is locked and its vectors
are kept, since the claim is about the text tower. Pairs: drawings of two thirds of the 1,114 training concepts in
three styles, each with its names in eight languages ({trained}), of which one is drawn; a cell sees {pairs} of them,
in batches of 64, float32. Heads start in closed form from the other third, and train at 1e-4. Asked is which of the
names of the 138 test concepts belongs to a drawing, each language apart: in the trained styles (T3), and in a new one
(T4). {held} are never trained. "Poor" are languages with little text on the web, "rich" the others. Learning rates
are chosen with seed 0 on validation concepts in the validation style, in the trained languages. "All blocks" leaves
the word embeddings frozen."""

KEPT = """k-NN and linear probe: pooled output of the image tower, fitted on CIFAR-10 training photos, asked about its
test photos. Sentences: whether the nearest of all other captions of Flickr8k is of the same photo, by the pooled
output of the text tower. In brackets the change from the towers as they were. The cells are those of claim 1."""

BUDGETS = """Every row has the arithmetic of full training of the whole towers on {budget} pairs, forward and
backward, counted (products and attention). Memory of a step: all weights, for those that train gradient and
optimizer, and what {batch} pairs keep for the backward pass. For the same pairs instead of the same arithmetic, see
claim 3. A row that would need more than the {most} pairs there are is not trained."""

AS_GOOD = """How many pairs each needs to reach the top-5 that full training has on {pairs} pairs, read off between the
numbers of pairs of claim 3; arithmetic as counted; seconds at the pairs a second that were timed on an idle machine,
where they were."""

INTERVALS = "Intervals are 95 %, from a bootstrap over {groups} and seeds together, paired where rows are compared."
COULD_SEE = (
    "A difference {to} of {points:.1f} points would have been found in four cases of five, where that is least likely."
)
