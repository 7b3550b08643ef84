"""The database of a search: opened, made one recipe's own, and what its failures mean to a user.

    about = described(recipe, root)
    study = open_study("postgresql://me:secret@host/searches", "small", about)
    claim(study, about, folder, url)

What is shared by several processes or machines is this database alone: a file (SQLite) or a server, by its SQLAlchemy
URL. It is Optuna's, so other tools (optuna-dashboard) can look into it.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy

from bimo.errors import DataError, MissingDependencyError, UsageError
from bimo.recipe import Recipe, settings_of

__all__ = ["GRACE", "claim", "described", "open_study", "reachable", "storage_name"]

HEARTBEAT = 10  # seconds between signs of life of a trial
GRACE = 90  # seconds after which it counts as killed, where its machine cannot be asked
PATIENCE = 60.0  # seconds to wait for a database that others write to
APART = r"search\.trials$|report\.|(.*\.)?training\.(trackers|checkpoint_minutes|keep_checkpoints)\b"  # may change
DRIVERS = {"postgresql+psycopg": "psycopg[binary]", "postgresql+psycopg2": "psycopg2-binary", "mysql": "mysqlclient"}


def storage_name(url: str) -> str:
    """The URL without its password."""
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return url.partition("@")[2] or url


def described(recipe: Recipe, root: Path | None) -> dict[str, Any]:
    """{"training.steps": 50, ...}: all that trials have in common."""
    values = dict(settings_of(recipe.model_dump(mode="json")))
    prefix = f"{root.absolute()}/" if root else ""
    common = {
        key: value.removeprefix(prefix) if isinstance(value, str) else value
        for key, value in values.items()
        if not re.match(APART, key)
    }
    return dict(json.loads(json.dumps(common)))  # as it comes back from the database


def claim(study: optuna.Study, about: dict[str, Any], folder: Path, url: str) -> None:
    """Make a new study this recipe's; raises UsageError when it is another's. about: as from `described`."""
    known = study.user_attrs.get("recipe")
    place = f"the search {study.study_name} in {storage_name(url)}"
    mend = "give the recipe another name, or name another --storage or --out"
    if known is None:
        if study.get_trials(deepcopy=False):
            raise UsageError(f"{place} was not made by bimo tune: {mend}", "storage")
        if any((folder / "trials").glob("*/*")):
            raise UsageError(f"{folder / 'trials'} holds trials of another search, and {place} is new: name another "
                             f"--out, or remove that folder", "out")  # fmt: skip
        study.set_user_attr("recipe", about)
    elif known != about:
        key = next(key for key in (*about, *known) if about.get(key) != known.get(key))
        raise UsageError(f"{place} was made with another recipe, where {key} was {known.get(key)!r:.80} and not "
                         f"{about.get(key)!r:.80}: {mend}", "storage")  # fmt: skip


def open_study(url: str, name: str, about: dict[str, Any]) -> optuna.Study:
    """The study of that name, made if it is not there yet, or if its recipe was mended (it is not `about`) before any
    trial began. Raises UsageError for a URL that is none, that cannot be
    reached or is no database; MissingDependencyError for one whose driver is not installed."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sqlite = url.startswith("sqlite:")
    connect = {"connect_args": {"timeout": PATIENCE, "isolation_level": None}} if sqlite else {"pool_pre_ping": True}
    shown = storage_name(url)
    if url.startswith("postgresql://"):  # which driver that means, SQLAlchemy changed in 2.1
        url = url.replace("postgresql", "postgresql+psycopg", 1)
    for attempt in range(3):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                storage = optuna.storages.RDBStorage(
                    url, engine_kwargs=connect, heartbeat_interval=HEARTBEAT, grace_period=GRACE
                )
            break
        except ImportError:
            driver = sqlalchemy.make_url(url).drivername
            raise MissingDependencyError(DRIVERS.get(driver, driver), f"the storage {shown}") from None
        except (sqlalchemy.exc.ArgumentError, ValueError):
            raise UsageError(f"--storage takes a URL, sqlite:///search.db or postgresql://user:password@host/name, not "
                             f"{shown!r}", "storage") from None  # fmt: skip
        except sqlalchemy.exc.DBAPIError as error:
            if attempt == 2:
                cause = " ".join(str(error.orig).split())
                raise UsageError(f"the storage {shown} cannot be reached ({cause}): check the URL, and that its server "
                                 f"runs and lets you in", "storage") from None  # fmt: skip
            time.sleep(0.2)  # another machine may be making the tables just now
        except RuntimeError as error:
            cause = " ".join(str(error).split())
            raise UsageError(f"the storage {shown} was made by another version of optuna: {cause}", "storage") from None
    if sqlite:
        # SQLite locks when it writes, which is too late for read-then-write: two processes would take the same trial.
        sqlalchemy.event.listen(
            storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE")
        )
    with reachable():
        study = optuna.create_study(study_name=name, storage=storage, direction="minimize", load_if_exists=True)
        begun = any(trial.state is not optuna.trial.TrialState.WAITING for trial in study.get_trials(deepcopy=False))
        if begun or study.user_attrs.get("recipe", about) == about:
            return study
        optuna.delete_study(study_name=name, storage=storage)
        return optuna.create_study(study_name=name, storage=storage, direction="minimize", load_if_exists=True)


@contextlib.contextmanager
def reachable() -> Iterator[None]:
    """A database that fails on the way becomes a DataError."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.DBAPIError) as error:
        cause = " ".join(str(getattr(error.__cause__ or error, "orig", error)).split())
        raise DataError(f"the search's storage failed ({cause:.200}): once it is back, run the same command again, it "
                        f"goes on where it stopped") from error  # fmt: skip
