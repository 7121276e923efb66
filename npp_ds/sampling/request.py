"""What is to be sampled: the images asked for, the tokenizer that belongs to the weights, the folder."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from npp_ds.checkpoint.open import Weights
from npp_ds.errors import UserError
from npp_ds.sampling.decode import option_problems
from npp_ds.sampling.folder import samples_of
from npp_ds.sampling.sampler import DTYPES, LABEL_CHOICES, Options
from npp_ds.tokenizer.loading import tokenizer_of
from npp_ds.tokenizer.vq import VQModel

PART_SIZE = 256


@dataclass(frozen=True)
class Request:
    """Which images are wanted: numbers 0 .. `count` - 1, with labels of `classes` as `labels_of` deals them.

    They are resized to `image_size` pixels (None: as they are decoded). `dtype` is that of the model, "fp32" or "bf16";
    the tokenizer decodes in float32. A process draws `part_size` images before it writes them.
    """

    classes: Sequence[int]
    count: int
    labels: str = "balanced"
    options: Options = field(default_factory=Options)
    image_size: int | None = None
    dtype: str = "fp32"
    part_size: int = PART_SIZE

    def check(self, weights: Weights, tokenizer: VQModel) -> None:
        """Raises UserError naming everything that these weights and this tokenizer cannot make."""
        problems = [
            f"{name}: found {value}, expected a whole number of at least 1"
            for name in ("count", "image_size", "part_size")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        options = {name: value for name, value in asdict(self.options).items() if name != "seed"}
        problems += option_problems(weights.model.grid_size, **options)
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
                f"count: {self.count} images cannot be shared out evenly to {n} classes; ask for {below + n}"
                + (f" or {below}" if below else "")
                + ", or for random labels"
            )
        if tokenizer.config.codebook_size != weights.model.vocab_size:
            problems.append(
                f"tokenizer {tokenizer.name}: it has {tokenizer.config.codebook_size} codes, the model draws from "
                f"{weights.model.vocab_size}; give the one whose codes it was trained on"
            )
        if problems:
            raise UserError("; ".join(problems))


def image_count(num_classes: int, per_class: int | None, count: int | None) -> int:
    """Images in all: `count`, or `per_class` (10 when neither is given) times the classes. UserError for both."""
    if count is not None and per_class is not None:
        raise UserError(f"count and per_class: found {count} and {per_class}, expected one of them")
    for name, value in (("per_class", per_class), ("count", count)):
        if value is not None and value < 1:
            raise UserError(f"{name}: found {value}, expected a whole number of at least 1")
    return count or (per_class or 10) * num_classes


def parse_classes(wanted: Sequence[int | str] | None, num_classes: int, class_names: Sequence[str]) -> list[int]:
    """Class numbers from numbers or names, None meaning all.

    Raises UserError naming every one that does not exist, and names that several classes have with their numbers.
    """
    if wanted is None:
        return list(range(num_classes))
    numbers: dict[str, list[int]] = {}
    for i, name in enumerate(class_names):
        numbers.setdefault(name, []).append(i)
    choices = [numbers.get(str(w), [int(w) if str(w).isdecimal() else -1]) for w in wanted]
    shared = [(w, choice) for w, choice in zip(wanted, choices, strict=True) if len(choice) > 1]
    if shared:
        texts = [f"{w} is the name of {' and '.join(map(str, choice))}" for w, choice in shared]
        raise UserError(f"classes: {'; '.join(texts)}; give the number of the one you mean")
    found = [choice[0] for choice in choices]
    unknown = [str(w) for w, c in zip(wanted, found, strict=True) if not 0 <= c < num_classes]
    if unknown or not found:
        names = f" or one of {', '.join(class_names[:20])}" if class_names else ""
        raise UserError(f"classes: found {', '.join(unknown) or 'none'}, expected numbers 0..{num_classes - 1}{names}")
    return found


def split_classes(text: str, class_names: Sequence[str]) -> list[str]:
    """The numbers and names of a list with commas between; a name that has commas itself is kept whole."""
    words, found = [word.strip() for word in text.split(",")], []
    names = {", ".join(map(str.strip, name.split(","))): name for name in class_names}
    longest = max((name.count(",") for name in names), default=0) + 1
    while words:
        size = next((n for n in range(min(longest, len(words)), 0, -1) if ", ".join(words[:n]) in names), 1)
        joined = ", ".join(words[:size])
        found.append(names.get(joined, joined))
        words = words[size:]
    return found


def companions(weights: Weights, tokenizer: str | Path | None = None) -> tuple[VQModel, list[str]]:
    """The tokenizer that decodes what these weights draw, and the class names, empty where they are not known.

    The tokenizer is the one named, else the one that the run's config names, else one at hand that made the codes they
    were trained on; UserError when it cannot be told, or when another one made those codes.
    """
    named = tokenizer or (weights.config.data.tokenizer if weights.config else None)
    return tokenizer_of(weights.tokenizer, named), list(weights.class_names)


def default_folder(weights: Weights, request: Request) -> Path:
    """A folder of `samples_of` these weights, named by the settings.

    The settings are step, guidance, seed and number of images, then whatever else differs from the usual: what people
    change does not share a folder.
    """
    options, usual = asdict(request.options), asdict(Options())
    step = [f"step-{weights.step:08d}"] if weights.step is not None else []
    parts = [*step, f"cfg-{options['cfg_scale']:g}", f"seed-{options['seed']}", f"{request.count}-images"]
    for name, value in options.items():
        if value != usual[name] and name not in ("cfg_scale", "seed"):
            parts.append(f"{name.replace('_', '-')}-{value if isinstance(value, str) else f'{value:g}'}")
    parts += [
        word for word in (weights.variant, request.labels, request.dtype) if word not in ("raw", "balanced", "fp32")
    ]
    if (n := len(request.classes)) < weights.model.num_classes:
        parts.append("-".join(["classes", *map(str, request.classes[:8]), *([f"and-{n - 8}-more"] if n > 8 else [])]))
    if request.image_size:
        parts.append(f"{request.image_size}-pixels")
    return samples_of(weights.path) / "-".join(parts)


def stage_warning(weights: Weights, options: Options) -> str | None:
    """What to say when a model is sampled at another patch side than that of the stage it was last trained in."""
    if weights.patch_side in (None, options.patch_side):
        return None
    return (
        f"WARNING: these weights are from a stage of patch side {weights.patch_side} and are sampled at "
        f"{options.patch_side}; sample them with --patch-side {weights.patch_side}"
    )
