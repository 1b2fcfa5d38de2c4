"""Where a recipe's model is: bundled, a directory, a GGUF file or the Hub. No torch here.

`locate` only looks, offline and fast, for a plan; `fetch` really gets what is missing.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.core.artifact import TOKEN_KINDS, Artifact
from tutelage.core.errors import ModelError
from tutelage.core.files import is_disk_full
from tutelage.core.fingerprint import fingerprint
from tutelage.models import catalog
from tutelage.models.convert import convert, converted_identity, is_converted
from tutelage.models.inspect import (
    ModelFacts,
    content_digest,
    describe,
    describe_unseen,
    read_config,
    weight_files,
)
from tutelage.models.pangu import is_pangu, plain_identity, write_plain
from tutelage.recipe.tables import SERVED, ModelSource
from tutelage.text.tokenizer import tokenizer_digest

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_PATTERNS = [
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "*.model",
]  # fmt: skip


@dataclass(frozen=True)
class External:
    """A model from outside, as far as it is known without fetching anything."""

    source: str
    path: Path | None
    """Its Hugging Face directory; None until it is fetched."""
    identity: Mapping[str, Any]
    """What stands for its content in the identity of every step that reads it."""
    facts: ModelFacts | None

    def as_artifact(self, identity: Mapping[str, Any]) -> Artifact:
        """The model in the form a stage takes its inputs. Raises ModelError until it is fetched."""
        if self.path is None:
            raise ModelError(f"{self.source} is not on this machine; run fetches it first")
        return Artifact(
            self.path,
            {
                "stage": "external",
                "fingerprint": fingerprint(identity),
                "identity": identity,
                "content": fingerprint(self.identity),
                "inputs": {},
                "summary": {},
                "tokens": dict.fromkeys(TOKEN_KINDS, 0),
                "seconds": 0.0,
                "files": {},
            },
        )


def locate(source: ModelSource, *, memo: Path) -> External:
    """Look for a recipe's model on this machine.

    Hashes of files are remembered in the JSON file `memo`. A model on the Hub that was never
    fetched has no content yet: its identity is then its name and revision, and no step made from
    it can exist. Raises ModelError when the source is none of the known kinds, or damaged.
    """
    name = source.source
    if source.is_served:
        return _located_served(source, memo)
    if name.startswith(catalog.PREFIX):
        model = catalog.lookup(name)
        content, path = {"sha256": model.identity}, catalog.find(model)
        return External(name, path, content, model.facts)
    if name.endswith(".gguf"):
        sha256 = content_digest(_existing(Path(name).expanduser()), cache=memo)
        directory = _gguf_directory(sha256)
        path = directory if is_converted(directory, gguf_sha256=sha256) else None
        identity = {"sha256": converted_identity(sha256)}
        return External(name, path, identity, describe(path) if path else None)
    path = _directory(name) or resolve_hub(name, source.revision)
    if path is None:
        unknown = {"hub": name, "revision": source.revision or "main"}
        return External(name, None, unknown, None)
    if is_pangu(path):
        plain, digest = _plain_directory(path, memo)
        return External(name, plain, {"sha256": digest}, describe(plain or path))
    identity: dict[str, Any] = {"sha256": content_digest(path, cache=memo)}
    if source.trust_remote_code:  # `load` asks for it, and it decides which code runs
        identity["trust_remote_code"] = True
    return External(name, path, identity, describe(path))


def fetch(source: ModelSource, *, say: Callable[[str], None] = lambda line: None) -> Path:
    """Have a recipe's model as a Hugging Face directory on this machine; returns its path.

    Raises ModelError when it cannot be had.
    """
    name = source.source
    if source.is_served:
        return _fetched_served(source, say)
    if name.startswith(catalog.PREFIX):
        return catalog.pull(name, say=say)
    if name.endswith(".gguf"):
        return _convert_gguf(_existing(Path(name).expanduser()), say)
    path = (
        _directory(name)
        or resolve_hub(name, source.revision)
        or download_hub(name, source.revision, code=source.trust_remote_code, say=say)
    )
    return _plain(path, say)


def _located_served(source: ModelSource, memo: Path) -> External:
    """Known by its name and revision, and by the tokenizer that is here; not by its weights."""
    named = {"served": source.source.removeprefix(SERVED), "revision": source.revision}
    path = _tokenizer_of(source)
    if path is not None and is_pangu(path):
        path, _ = _plain_directory(path, memo)
    if path is None:
        unknown = {"tokenizer": source.tokenizer}
        return External(source.source, None, {**named, **unknown}, None)
    digests = {"tokenizer": tokenizer_digest(path), "config": fingerprint(read_config(path))}
    return External(source.source, path, {**named, **digests}, describe_unseen(path))


def _tokenizer_of(source: ModelSource) -> Path | None:
    name = source.tokenizer
    if name.startswith(catalog.PREFIX):
        return catalog.find(catalog.lookup(name))
    return _directory(name) or resolve_hub(name, "", weights=False)


def _fetched_served(source: ModelSource, say: Callable[[str], None]) -> Path:
    name = source.tokenizer
    if name.startswith(catalog.PREFIX):
        return catalog.pull(name, say=say)
    path = _tokenizer_of(source) or download_hub(name, "", code=False, weights=False, say=say)
    return _plain(path, say)


def resolve_hub(name: str, revision: str, *, weights: bool = True) -> Path | None:
    """The whole snapshot of a Hub model in the local cache, or None. Never asks the network.

    Without `weights`, tokenizer and config are enough.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(name, revision=revision or None, local_files_only=True))
        if weights:
            weight_files(path)
    except (LocalEntryNotFoundError, ModelError):  # never fetched, or its fetching was cut short
        return None
    except HFValidationError:
        raise ModelError(_unknown(name)) from None
    return path if (path / "config.json").exists() else None


def download_hub(
    name: str, revision: str, *, code: bool, say: Callable[[str], None], weights: bool = True
) -> Path:
    """Fetch a Hub model's weights, configuration and tokenizer (and, with `code`, its Python).

    Goes on where an earlier download stopped. Raises ModelError on a missing or gated model, a
    missing revision, no network, a full disk, or a model without safetensors.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [p for p in HUB_PATTERNS if weights or "safetensors" not in p] + ["*.py"] * code
    wanted = f"{name} at {revision or 'main'}"
    say(f"fetching {wanted} from the Hub")
    try:
        path = snapshot_download(name, revision=revision or None, allow_patterns=patterns)
    except GatedRepoError:  # before its parent, RepositoryNotFoundError
        raise ModelError(
            f"{name} asks for consent first: accept its terms on its page, then run "
            "`hf auth login` and try again"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(f"{name} is not on the Hub, or private; {_unknown(name)}") from None
    except RevisionNotFoundError:
        raise ModelError(f"{name} has no revision {revision!r}; check models.*.revision") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        if is_disk_full(error):
            raise ModelError(f"no room left for {wanted}; make some and run again") from error
        raise ModelError(
            f"{wanted} is not in the local cache and the Hub cannot be reached; check the network "
            "and HF_HUB_OFFLINE, or give a directory as source"
        ) from error
    found = resolve_hub(name, revision, weights=weights)
    if found is None:  # offline, the client passes off what an earlier download left as the whole
        raise ModelError(
            f"{wanted} has no whole set of safetensors weights in {path}: if the network was away, "
            "run again when it is back; else take a revision or a model that has safetensors"
        )
    return found


def _convert_gguf(gguf: Path, say: Callable[[str], None]) -> Path:
    sha256 = content_digest(gguf, cache=catalog.cache_directory() / "hashes.json")

    def announced() -> Path:
        say(f"converting {gguf.name} to safetensors, once")
        return gguf

    return convert(announced, _gguf_directory(sha256), gguf_sha256=sha256, say=say)


def _plain(path: Path, say: Callable[[str], None]) -> Path:
    """The directory itself, or for an openPangu checkpoint its plain form, made once."""
    if not is_pangu(path):
        return path
    digest = plain_identity(content_digest(path, cache=catalog.cache_directory() / "hashes.json"))

    def announced() -> Path:
        say(f"writing {path.name} as plain Llama, once; its own code is not run")
        return path

    return convert(
        announced, _pangu_directory(path, digest), gguf_sha256=digest, say=say, write=write_plain
    )


def _plain_directory(path: Path, memo: Path) -> tuple[Path | None, str]:
    """(The plain form of an openPangu checkpoint, or None until it is made; its identity)."""
    digest = plain_identity(content_digest(path, cache=memo))
    directory = _pangu_directory(path, digest)
    return directory if is_converted(directory, gguf_sha256=digest) else None, digest


def _pangu_directory(path: Path, digest: str) -> Path:
    # Its place is part of the name: a copy elsewhere must not be read through links to this one.
    place = fingerprint({"identity": digest, "links to": str(path.resolve())})
    return catalog.cache_directory() / "models" / f"pangu-{place[:16]}"


def _gguf_directory(sha256: str) -> Path:
    return catalog.cache_directory() / "models" / f"gguf-{sha256[:16]}"


def _directory(name: str) -> Path | None:
    """The directory a source names, or None when it can only be a Hub id. Raises ModelError."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelError(_unknown(name))
    return None


def _existing(gguf: Path) -> Path:
    if not gguf.is_file():
        raise ModelError(f"{gguf}: no such GGUF file; check the path (relative to {os.getcwd()})")
    return gguf


def _unknown(name: str) -> str:
    return (
        f"{name!r} is no model source: give bundled:NAME, an existing directory, a .gguf file, "
        "or a Hub id owner/name"
    )
