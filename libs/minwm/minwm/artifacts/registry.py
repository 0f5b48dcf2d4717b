"""The model registry: numbered versions of named models in an artifact store, with lineage, metrics and aliases.

In the store, `models/NAME/contents/DIGEST/…` holds files, `models/NAME/versions/N.json` makes them version N,
and `models/NAME/aliases/ALIAS` says a number. A version's JSON is written last: what lacks it does not exist.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from minwm.artifacts.store import ArtifactStore, folder_digest
from minwm.config import build
from minwm.errors import ArtifactError, ConfigError

LATEST = "latest"

_MODELS = "models"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class TrainedStage:
    """One stage of training that made a model: its recipe's name and how many steps it ran."""

    recipe: str
    steps: int


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where a model comes from: digests of its dataset and starting weights, its stages in order, the code."""

    dataset: str
    parents: tuple[str, ...] = ()
    stages: tuple[TrainedStage, ...] = ()
    code_version: str


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """One registered version. `digest` is that of its folder (`folder_digest`), `created` ISO 8601 in UTC."""

    name: str
    version: int
    digest: str
    created: str
    lineage: Lineage
    metrics: dict[str, float]


class ModelRegistry:
    """Registers, finds and fetches versions of models. Its errors are ArtifactError."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def register(
        self,
        name: str,
        folder: Path,
        lineage: Lineage,
        metrics: Mapping[str, float],
        *,
        created: datetime | None = None,
    ) -> ModelVersion:
        """Make the content of `folder` the next version of the model; `created` is now unless given.

        Content that an earlier version has is stored once and gets a new number. Raises ArtifactError for a
        malformed name, an empty folder and metrics that are not finite.
        """
        _require_name("model name", name)
        figures = {metric: float(value) for metric, value in metrics.items()}
        for metric, value in figures.items():
            if not math.isfinite(value):
                raise ArtifactError(f"metrics: {metric}={value} of {name}, expected a finite number")
        digest = folder_digest(folder)
        self._store.put_folder(_contents(name, digest), folder)
        time = (created or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="microseconds")
        while True:
            number = max(self._numbers(name), default=0) + 1
            version = ModelVersion(
                name=name, version=number, digest=digest, created=time, lineage=lineage, metrics=figures
            )
            try:
                self._store.put_bytes(_metadata(name, number), json.dumps(asdict(version), indent=1).encode())
            except ArtifactError:
                if not self._store.exists(_metadata(name, number)):
                    raise
                continue  # somebody else took the number meanwhile
            return version

    def get(self, name: str, version: int | str = LATEST) -> ModelVersion:
        """The version of that number, of that alias, or the latest."""
        _require_name("model name", name)
        numbers = self._numbers(name)
        if not numbers:
            known = ", ".join(sorted({key.split("/")[1] for key in self._store.list(_MODELS)})) or "none"
            raise ArtifactError(f"no model {name!r} is registered; registered are: {known}")
        number = self._resolve(name, version, max(numbers))
        if number not in numbers:
            raise ArtifactError(f"{name}@{version}: no such version; there are {', '.join(map(str, numbers))}")
        return self._read(name, number)

    def fetch(self, ref: str, folder: Path) -> Path:
        """Put the files of `name`, `name@3` or `name@alias` in `folder`, checked against their digest.

        A folder that already holds just these files is left as it is; one that holds others is refused.
        """
        name, _, which = ref.partition("@")
        version = self.get(name, which or LATEST)
        if folder.is_dir() and any(folder.iterdir()) and folder_digest(folder) == version.digest:
            return folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder.parent, prefix=".partial-") as aside:
                fetched = self._store.get_folder(_contents(name, version.digest), Path(aside) / "model")
                if folder_digest(fetched) != version.digest:
                    raise ArtifactError(f"{ref}: its files in the store are damaged (expected digest {version.digest})")
                fetched.rename(folder)
        except OSError as error:
            raise ArtifactError(
                f"{folder}: cannot hold {ref} ({error}), expected a new or empty folder, or one with its files"
            ) from error
        return folder

    def promote(self, name: str, version: int, alias: str) -> ModelVersion:
        """Let `name@alias` mean this version from now on. An alias is a name, neither a number nor `latest`."""
        _require_name("alias", alias)
        if alias == LATEST or alias.isdigit():
            raise ArtifactError(f"alias {alias!r}: expected a name other than {LATEST!r}, and no number")
        promoted = self.get(name, version)
        self._store.put_bytes(f"{_aliases(name)}/{alias}", str(version).encode(), replace=True)
        return promoted

    def aliases(self, name: str) -> dict[str, int]:
        """The aliases of a model and the version each means."""
        return {key.rpartition("/")[2]: self._read_alias(key) for key in self._store.list(_aliases(name))}

    def list(self) -> tuple[ModelVersion, ...]:
        """All versions of all models, by name and number."""
        names = sorted({key.split("/")[1] for key in self._store.list(_MODELS)})
        return tuple(self._read(name, number) for name in names for number in self._numbers(name))

    def _numbers(self, name: str) -> tuple[int, ...]:
        """The numbers of a model's versions, ascending."""
        keys = self._store.list(f"{_MODELS}/{name}/versions")
        return tuple(sorted(int(stem) for key in keys if (stem := Path(key).stem).isdecimal()))

    def _resolve(self, name: str, version: int | str, latest: int) -> int:
        if isinstance(version, int):
            return version
        if version == LATEST:
            return latest
        if version.isdecimal():
            return int(version)
        aliases = self.aliases(name)
        if version not in aliases:
            known = ", ".join([LATEST, *aliases])
            raise ArtifactError(f"{name}@{version}: no such alias; expected a version's number, or one of {known}")
        return aliases[version]

    def _read_alias(self, key: str) -> int:
        content = self._store.get_bytes(key)
        if not content.isdigit():
            raise ArtifactError(f"{key}: damaged, it holds {content[:20]!r}, expected a version's number")
        return int(content)

    def _read(self, name: str, number: int) -> ModelVersion:
        key = _metadata(name, number)
        try:
            version = build(ModelVersion, json.loads(self._store.get_bytes(key)))
        except (ValueError, TypeError, AttributeError, ConfigError) as error:
            raise ArtifactError(f"{key}: damaged, not a version this code can read ({error})") from error
        if (version.name, version.version) != (name, number):
            raise ArtifactError(f"{key}: damaged, it describes {version.name}@{version.version}")
        return version


def _contents(name: str, digest: str) -> str:
    return f"{_MODELS}/{name}/contents/{digest}"


def _metadata(name: str, number: int) -> str:
    return f"{_MODELS}/{name}/versions/{number}.json"


def _aliases(name: str) -> str:
    return f"{_MODELS}/{name}/aliases"


def _require_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ArtifactError(f"{what} {name!r}: expected lower-case letters, digits, '.', '_' and '-', as in wan-doom")
