"""What to sample: the requested images, the tokenizer and class names that belong to the weights, the folder."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from npp_ds.checkpoint.export import TOKENIZER_FOLDER
from npp_ds.checkpoint.open import Weights
from npp_ds.errors import UserError, did_you_mean, similar_names
from npp_ds.sampling.folder import samples_of
from npp_ds.sampling.logits_processing import Options
from npp_ds.sampling.sampler import DTYPES, LABEL_CHOICES
from npp_ds.tokenizer.loading import tokenizer_of
from npp_ds.tokenizer.vq import VQModel
from npp_ds.utils.hub import WEIGHTS_FILE

PART_SIZE = 256
NO_NAMES = "; the names of the classes are not known: a run has those of its shards, so run this where `data.train` is"


@dataclass(frozen=True)
class Request:
    """The images 0 .. `count` - 1, with labels of `classes` that `labels_of` assigns.

    They are resized to `image_size` pixels; None keeps the size of the tokenizer's output. `dtype` is that of the
    model, "fp32" or "bf16"; the tokenizer decodes in float32. A process samples `part_size` images before it writes
    them.
    """

    classes: Sequence[int]
    count: int
    labels: str = "balanced"
    options: Options = field(default_factory=Options)
    image_size: int | None = None
    dtype: str = "fp32"
    part_size: int = PART_SIZE

    def check(self, weights: Weights, tokenizer: VQModel) -> None:
        """Raise a UserError that names everything that is impossible with these weights and this tokenizer."""
        problems = [
            f"{name}: found {value}, expected a whole number of at least 1"
            for name in ("count", "image_size", "part_size")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        problems += self.options.problems(weights.model.grid_size)
        if self.options.cfg_scale != 1 and not weights.has_null_class:
            problems.append(
                f"cfg_scale: found {self.options.cfg_scale:g}, but the model was trained without class dropout, so it "
                "has no null class to guide with; use 1"
            )
        if self.labels not in LABEL_CHOICES:
            problems.append(f"labels: found {self.labels!r}, expected one of {', '.join(LABEL_CHOICES)}")
        if self.dtype not in DTYPES:
            problems.append(f"dtype: found {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        n = len(self.classes)
        if len(set(self.classes)) < n:
            problems.append("classes: some are named twice, expected each once")
        if self.labels == "balanced" and self.count % n:
            below = self.count // n * n
            problems.append(
                f"count: {self.count} images cannot be divided evenly among {n} classes; use {below + n}"
                + (f" or {below}" if below else "")
                + ", or random labels"
            )
        if tokenizer.config.codebook_size != weights.model.vocab_size:
            problems.append(
                f"tokenizer {tokenizer.name}: it has {tokenizer.config.codebook_size} codes, the model has "
                f"{weights.model.vocab_size}; give the tokenizer whose codes the model was trained on"
            )
        if problems:
            raise UserError("; ".join(problems))


def image_count(num_classes: int, per_class: int | None, count: int | None) -> int:
    """Return the number of images: `count`, or `per_class` (default 10) times the classes; UserError for both."""
    if count is not None and per_class is not None:
        raise UserError(f"count and per_class: found {count} and {per_class}, expected one of them")
    for name, value in (("per_class", per_class), ("count", count)):
        if value is not None and value < 1:
            raise UserError(f"{name}: found {value}, expected a whole number of at least 1")
    return count or (per_class or 10) * num_classes


def parse_classes(wanted: Sequence[int | str] | None, num_classes: int, class_names: Sequence[str]) -> list[int]:
    """Return class numbers for numbers or names; None means all classes. Letter case is ignored unless names need it.

    Raises UserError that names all unknown classes, with names like them, or all names that several classes share,
    with their numbers.
    """
    if wanted is None:
        return list(range(num_classes))
    exact: dict[str, list[int]] = {}
    in_any_case: dict[str, list[int]] = {}
    for i, name in enumerate(map(_normal, class_names)):
        exact.setdefault(name, []).append(i)
        in_any_case.setdefault(name.casefold(), []).append(i)

    def numbers_of(text: str) -> list[int]:
        named = exact.get(_normal(text)) or in_any_case.get(_normal(text).casefold())
        return named or [int(text) if text.isdecimal() else -1]

    choices = [numbers_of(str(w)) for w in wanted]
    shared = [(w, choice) for w, choice in zip(wanted, choices, strict=True) if len(choice) > 1]
    if shared:
        texts = [f"{w} is the name of {' and '.join(map(str, choice))}" for w, choice in shared]
        raise UserError(f"classes: {'; '.join(texts)}; give the number of the one you mean")
    found = [choice[0] for choice in choices]
    unknown = [str(w) for w, c in zip(wanted, found, strict=True) if not 0 <= c < num_classes]
    if unknown or not found:
        hint = did_you_mean([name for w in unknown for name in similar_names(_normal(w), class_names)])
        names = f" or one of {', '.join(class_names[:20])}" if class_names else NO_NAMES
        raise UserError(
            f"classes: found {', '.join(unknown) or 'none'}{hint or ','} expected numbers 0..{num_classes - 1}{names}"
        )
    return found


def split_classes(text: str, class_names: Sequence[str]) -> list[str]:
    """Split a comma-separated list of class numbers and names. A known name that contains commas stays whole."""
    words, found = _normal(text).split(", "), []
    names = {_normal(name).casefold() for name in class_names}
    longest = max((name.count(",") for name in names), default=0) + 1
    while words:
        sizes = range(min(longest, len(words)), 0, -1)
        size = next((n for n in sizes if ", ".join(words[:n]).casefold() in names), 1)
        found.append(", ".join(words[:size]))
        words = words[size:]
    return found


def _normal(name: str) -> str:
    """Return a class name with one space after each comma."""
    return ", ".join(map(str.strip, name.split(",")))


def find_tokenizer(weights: Weights, tokenizer: str | Path | None = None) -> VQModel:
    """Load the tokenizer that decodes the codes of these weights.

    It is the one given by name or file, else that of the run's config or of the exported folder, else an available one
    that made the codes of the training data. Raises UserError if none is known, and if another one made those codes.
    """
    beside = weights.path.parent / TOKENIZER_FOLDER
    if weights.config:
        tokenizer = tokenizer or weights.config.data.tokenizer
    elif weights.path.name == WEIGHTS_FILE and beside.is_dir():
        tokenizer = tokenizer or beside
    return tokenizer_of(weights.tokenizer, tokenizer)


def default_folder(weights: Weights, request: Request) -> Path:
    """Return the folder for the samples of a request, inside `samples_of` these weights.

    Its name holds the step, guidance scale, seed and number of images, then every other setting that differs from the
    default. So different settings have different folders.
    """
    options, usual = asdict(request.options), asdict(Options())
    step = [f"step-{weights.step:08d}"] if weights.step is not None else []
    parts = [*step, f"cfg-{options['cfg_scale']:g}", f"seed-{options['seed']}", f"{request.count}-images"]
    for name, value in options.items():
        if value != usual[name] and name not in ("cfg_scale", "seed"):
            parts.append(f"{name.replace('_', '-')}-{value if isinstance(value, str) else f'{value:g}'}")
    words = (weights.variant, request.labels, request.dtype)
    parts += [word for word in words if word not in ("raw", "balanced", "fp32")]
    if (n := len(request.classes)) < weights.model.num_classes:
        parts.append("-".join(["classes", *map(str, request.classes[:8]), *([f"and-{n - 8}-more"] if n > 8 else [])]))
    if request.image_size:
        parts.append(f"{request.image_size}-pixels")
    return samples_of(weights.path) / "-".join(parts)


def stage_warning(weights: Weights, options: Options) -> str | None:
    """Return a warning if the model is sampled at another patch side than that of its last training stage."""
    if weights.patch_side in (None, options.patch_side):
        return None
    return (
        f"these weights are from a stage of patch side {weights.patch_side} and are sampled at "
        f"{options.patch_side}; sample them with --patch-side {weights.patch_side}"
    )
