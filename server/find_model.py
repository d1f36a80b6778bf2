"""Find the directory of the user's model. Server and engine share this directory."""

import difflib
from dataclasses import replace
from pathlib import Path

import foveate.bundled
from foveate.configs.config import Config
from foveate.configs.errors import ConfigError
from foveate.engine.geometry.refusals import check_files, check_settings

_SETTINGS = ["*.json", "*.jinja", "*.model", "*.txt"]  # no code, no pickled weights
_FILES = [*_SETTINGS, "*.safetensors"]


def find_model(config: Config) -> tuple[Config, Path]:
    """Locate the model: a bundled name, a local directory, or a hub name. Download a hub model unless it is cached.

    Returns:
        `config` with `model.path` absolute, `model.name` and `model.aliases` filled in, and the model's directory.

    Raises:
        ConfigError: the name is none of the three, the directory holds no model that this server reads, or the download
            fails.
    """
    name = config.model.path
    directory = (foveate.bundled.path(name) or _local(name) or _from_hub(name)).resolve()
    check_files(directory, ConfigError)
    if not (directory / "config.json").is_file():
        raise ConfigError(f"model.path: {directory} holds no config.json; a Hugging Face model directory does")
    first, *others = _names(config, directory)
    return replace(
        config, model=replace(config.model, path=str(directory), name=first, aliases=tuple(others))
    ), directory


def _names(config: Config, directory: Path) -> list[str]:
    """Return the names of the model, each once. Without a name in the settings: the last part of the path, the path."""
    given = config.model
    own = [given.name]
    if not given.name:
        path = given.path.rstrip("/")
        last = path.rpartition("/")[2]
        own = [directory.name] if last in ("", ".", "..", "~") else [last, path]
    return list(dict.fromkeys([*own, *given.aliases]))


def _local(name: str) -> Path | None:
    path = Path(name).expanduser()
    if path.is_file():
        raise ConfigError(f"model.path: {name} is a file; give the directory that holds config.json and the weights")
    return path if path.is_dir() else None


def _from_hub(name: str) -> Path:
    bundled = foveate.bundled.names()
    close = difflib.get_close_matches(name, bundled, n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; bundled are {', '.join(bundled)}"
    if name.count("/") != 1 or name.startswith((".", "~", "/")) or name.endswith("/"):
        raise ConfigError(
            f"model.path: {name} is no directory, nor a bundled model, nor a hub name like org/model{hint}"
        )
    # Imported late: these modules are slow to import and needed only here.
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # The small files first: a checkpoint that is refused by them is not downloaded.
        check_settings(Path(snapshot_download(name, allow_patterns=_SETTINGS)), ConfigError)
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"model.path: the hub does not give {name}: {said}{hint}") from error
