"""`foveate tune MODEL DATA`: the whole run, from arguments to output files."""

import hashlib
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import foveate
from foveate.configs.config import Config
from foveate.configs.errors import ConfigError
from foveate.engine.common import MethodInfo
from foveate.server.find_model import find_model
from foveate.tune.asking import Asked, Asker
from foveate.tune.confidence import RISK, SURE, allowed_misses, pairs_needed
from foveate.tune.data import HELD_OUT, HELD_OUT_SHARE, PARTS, SCENES, Pair, read, sample, split
from foveate.tune.measure import Bench
from foveate.tune.plan import expected_steps, run
from foveate.tune.progress import Progress
from foveate.tune.report import Setting, write
from foveate.tune.state import State

METHODS = ("foveal", "mmtok", "tome", "tome;keep=0.75+foveal")
_FORMAT = 2  # of the measurements in the state; those of another format are ignored
_SAMPLE_BYTES = 2**16  # bytes per sample; three samples identify a weight file


@dataclass(frozen=True, kw_only=True)
class Options:
    """The user's arguments."""

    config: Config  # names the model to tune
    data: str = SCENES
    agreement: float = 0.99
    limit: int | None = None
    max_tokens: int = 64
    methods: tuple[str, ...] = ()  # empty: the entries of METHODS that suit the model
    n_scenes: int = 300
    every: int = 0  # 0: chosen so that the search covers about twelve layers
    seed: int = 0
    out: Path | None = None


def tune(options: Options) -> Path:
    """Search, choose, confirm and write the report. Return the output folder.

    Raises:
        ConfigError: an argument, the data or the model is wrong.
    """
    _check(options)
    asked_for = options.config.model.path
    config, directory = find_model(options.config)
    pairs = sample(read(options.data, options.n_scenes, options.seed), options.limit, options.seed)
    parts = split(pairs, options.seed)
    _check_pairs(options, parts)
    out = _folder(options.out or Path(f"tuned-{config.model.name}"))
    asker = Asker(config, directory)
    methods = _methods(options.methods, asker)
    prepared = {part: asker.prepare(parts[part]) for part in PARTS}
    state = State(out / "state.jsonl", _fingerprint(config, directory, prepared, options))
    every = options.every or -(-asker.model.spec.n_layers // 12)
    progress = Progress(expected_steps(asker.model.spec.n_layers // every, len(methods)))
    bench = Bench(asker, prepared, state, options.max_tokens, progress.step)
    try:
        result = run(bench, options.agreement, methods, every, options.seed, _words(asker))
    finally:
        progress.end()
    setting = Setting(
        model=str(directory) if Path(asked_for).expanduser().is_dir() else asked_for,
        data=options.data,
        agreement=options.agreement,
        seed=options.seed,
        max_tokens=options.max_tokens,
        counts={part: len(parts[part]) for part in PARTS},
        n_pictures={part: len({pair.picture for pair in parts[part]}) for part in PARTS},
        right={part: bench.reference(part).right for part in PARTS},
        every=every,
    )
    for line in write(out, setting, result):
        print(line)
    return out


def _check(options: Options) -> None:
    if options.agreement == 1.0:
        raise ConfigError("--agreement: no number of pairs confirms 1; ask for less, for example 0.99")
    if not 0.0 < options.agreement < 1.0:
        raise ConfigError(f"--agreement: {options.agreement:g} is not in (0, 1)")
    counts = {"limit": options.limit, "max-tokens": options.max_tokens, "scenes": options.n_scenes}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: {value} is not positive")
    if options.every < 0:
        raise ConfigError(f"--every: {options.every} is negative; 0 means automatic")


def _check_pairs(options: Options, parts: dict[str, list[Pair]]) -> None:
    """Say what the held-out pairs can confirm. Raises ConfigError if they are too few."""
    agreement, n = options.agreement, len(parts[HELD_OUT])
    total, needed = sum(map(len, parts.values())), pairs_needed(agreement)
    most = allowed_misses(n, agreement)
    if most < 0:
        largest = max(Counter(pair.picture for part in parts.values() for pair in part).values())
        give = math.ceil((needed + largest - 1) / HELD_OUT_SHARE)  # a picture's pairs stay together
        more = f" (--scenes {options.n_scenes * give // total + 2})" if options.data == SCENES else ""
        possible = int(1000 * RISK ** (1 / n)) / 1000
        remedy = f"or ask for at most {possible:g}" if possible else "as so few confirm nothing"
        raise ConfigError(
            f"--agreement: {agreement:g} takes {needed} held-out pairs for {SURE}, even if no "
            f"answer changes; of {total} pairs {n} are held out: give {give} pairs{more}, {remedy}"
        )
    print(
        f"tune: {total} pairs, of which {n} are held out; {100 * agreement:g} % is confirmed ({SURE}) if "
        f"at most {most} of the held-out answers change, fewer if several are about one picture",
        file=sys.stderr,
        flush=True,
    )


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {out}: {error.strerror}") from None
    return out


def _methods(given: Sequence[str], asker: Asker) -> list[str]:
    """Return the reducers to compare. Raises ConfigError if a name is no reducer or does not suit the model."""
    for text in given:
        info = asker.check_method(text)
        if info.stage == "decoder":
            raise ConfigError(f"--methods: {text} acts inside the decoder; name what reduces before it")
        if info.name == "none":
            raise ConfigError("--methods: none keeps everything; name what reduces")
        if not _suits(info, asker):
            raise ConfigError(f"--methods: {text} is not for this model's vision tower")
    if given:
        return list(dict.fromkeys(given))
    return [name for name in METHODS if _suits(asker.check_method(name), asker)]


def _suits(info: MethodInfo, asker: Asker) -> bool:
    """Return whether a method suits the model. `tiles`: a method for tiled images suits any model."""
    has_cls = asker.model.spec.tower.has_cls
    return info.fits in ("any", "tiles") or (info.fits == "cls") == has_cls


def _words(asker: Asker) -> list[int]:
    """Return all token ids except special tokens."""
    tokenizer, spec = asker.prompter.tokenizer, asker.model.spec
    added = {spec.image_token_id, *spec.eos_ids, *tokenizer.get_added_tokens_decoder()}
    return sorted(i for i in tokenizer.get_vocab().values() if i not in added and i < spec.vocab_size)


def _fingerprint(config: Config, directory: Path, parts: dict[str, list[Asked]], options: Options) -> str:
    """Hash the common inputs of all measurements. The requested agreement and the methods are not included."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".jinja", ".txt", ".model"):
            digest.update(f"{path.name} ".encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with path.open("rb") as opened:
                for place in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                    opened.seek(place)
                    digest.update(opened.read(_SAMPLE_BYTES))
    for part, asked in parts.items():
        for one in asked:
            digest.update(f"{part} {one.image.digest.hex()} {one.prompt_ids} {one.answer!r}\n".encode())
    held = replace(config.model, path="", name="")
    digest.update(f"{held} {options.max_tokens} {options.seed} {foveate.__version__} {_FORMAT}".encode())
    return digest.hexdigest()[:16]


def main(options: Options) -> int:
    """Run the command. Return the exit status. Raises ConfigError."""
    out = tune(options)
    print(f"{out}/report.md says how; serve with: foveate serve --config {out}/preset.yaml")
    return 0
