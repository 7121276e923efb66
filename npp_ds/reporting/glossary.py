"""The terms that a report's page explains where they stand, and in its glossary."""

import re

from markupsafe import Markup, escape

GLOSSARY = {
    "patch side": "The side p of the square patches into which the map of codes is cut. A patch of p x p codes is one "
    "position of the sequence: the model sees the mean of their embeddings and predicts all of them. Side 1 is plain "
    "next-token prediction, which is what samples are drawn with.",
    "stage": "A part of the training with one patch side. Stages go from coarse to fine and end at side 1.",
    "code": "The number of a vector in the tokenizer's codebook. The tokenizer turns an image into a square map of "
    "codes and decodes such a map to an image.",
    "nats per code": "The mean negative log-likelihood of a code given all before it, with the natural logarithm. "
    "Lower is better; a uniform guess among V codes has ln V.",
    "validation": "The likelihood of held-out images, without dropout.",
    "moving average": "Weights averaged over the steps of training (EMA).",
    "Frechet distance": "The distance between two sets of images, each described by mean and covariance of a network's "
    "features. With Inception's features and 50,000 samples it is the FID; with fewer samples it is higher. Lower is "
    "better.",
    "CFG": "Classifier-free guidance: the scale by which sampling exaggerates what the class changes in the "
    "prediction. 1 is no guidance.",
    "next-token training": "Training on the same images at patch side 1 throughout.",
    "FLOPs": "Floating-point operations of forward and backward pass: 6 per matrix parameter and position, plus causal "
    "attention. TFLOPs, PFLOPs and EFLOPs are 10^12, 10^15 and 10^18.",
    "MFU": "Model FLOPs utilization: the model's FLOPs per second over the peak of the GPU.",
    "positions": "Elements of the sequences that the model computes: one per patch.",
    "epoch": "One pass over the training images.",
    "tokenizer": "The network (VQ model) that turns images into codes and codes into images. It is not trained here.",
}

_TERMS = re.compile(
    r"\b(" + "|".join(sorted(map(re.escape, GLOSSARY), key=len, reverse=True)) + r")(?!\w)", re.IGNORECASE
)
_KEYS = {term.lower(): term for term in GLOSSARY}


def anchor(term: str) -> str:
    """Return the id of a term's entry in the glossary."""
    return "term-" + term.lower().replace(" ", "-")


def with_terms(text: str) -> Markup:
    """Return a text as HTML in which the first use of each term links to its entry and shows it as hover text."""
    seen: set[str] = set()

    def link(match: re.Match[str]) -> str:
        term = _KEYS[match[0].lower()]
        if term in seen:
            return match[0]
        seen.add(term)
        explanation = escape(GLOSSARY[term])
        return (
            f'<a class="term" href="#{anchor(term)}" aria-describedby="{anchor(term)}">{match[0]}'
            f'<span class="tip" aria-hidden="true">{explanation}</span></a>'
        )

    return Markup(_TERMS.sub(link, str(escape(text))))
