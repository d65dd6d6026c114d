"""Which PostgreSQL, and engines on it.

Belongs here: resolving FLYWHEEL_DATABASE_URL or the embedded server to one URL, showing a URL without its secrets,
verifying that it is a PostgreSQL that Flywheel runs on, opening engines. Does not belong here: schema, and any query of
a room.
"""

from __future__ import annotations

import getpass
import os
import re
from typing import Final
from urllib.parse import quote_plus

import psycopg
import sqlalchemy as sa
from sqlalchemy import URL, Engine

from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.settings import Settings, get_settings
from flywheel_pipeline.errors import DatabaseUnavailable

MINIMUM_SERVER_VERSION: Final = 150000  # UNIQUE NULLS NOT DISTINCT came with PostgreSQL 15
CONNECT_TIMEOUT_SECONDS: Final = 10
APPLICATION_NAME: Final = "flywheel"
DRIVER: Final = "postgresql+psycopg"

_LOOK: Final = "SET client_connection_check_interval = '2s'"

_EXAMPLE = "postgresql://user:password@host:5432/database"
_ACCEPTED = ("postgresql", "postgres", "postgresql+psycopg", "postgresql+psycopg2")

#: Options of libpq whose values say where a connection goes and how, and open nothing; of all others only the name is shown.
_HARMLESS: Final = frozenset(
    {
        "application_name",
        "channel_binding",
        "client_encoding",
        "connect_timeout",
        "dbname",
        "fallback_application_name",
        "gssencmode",
        "host",
        "hostaddr",
        "keepalives",
        "keepalives_count",
        "keepalives_idle",
        "keepalives_interval",
        "load_balance_hosts",
        "passfile",
        "port",
        "service",
        "sslcert",
        "sslcrl",
        "sslkey",
        "sslmode",
        "sslnegotiation",
        "sslrootcert",
        "target_session_attrs",
        "tcp_user_timeout",
        "user",
    }
)
_HIDDEN: Final = "***"
#: libpq names an option that it does not know, and its value where it cannot be; a password's value never.
_NEVER_REPEATED: Final = frozenset({"password", "sslpassword"})


def resolve_url(settings: Settings | None = None, *, start: bool = True) -> URL:
    """Return the URL of the database in use, with the psycopg 3 driver.

    Without FLYWHEEL_DATABASE_URL it is the embedded server's, which is created and started where needed.
    With `start=False` nothing is started and nothing is connected to: the URL alone.

    Raises DatabaseUnavailable, in one sentence, for a URL without a scheme or of another database system,
    a server that cannot be reached, one older than PostgreSQL 15, or an embedded server that does not start.
    """
    settings = settings or get_settings()
    if settings.database_url is not None:
        url = parse_url(settings.database_url.get_secret_value())
    elif start:
        url = EmbeddedServer(settings.home).ensure_running()
    else:
        url = EmbeddedServer(settings.home).url
    if start:
        verify_server(url)
    return url


def login_in_use(settings: Settings | None = None) -> str:
    """Return the name of the login, to be said of it; nothing is connected to."""
    return resolve_url(settings, start=False).username or os.environ.get("PGUSER") or getpass.getuser()


def parse_url(text: str) -> URL:
    """Parse a database URL and set the psycopg 3 driver.

    Raises DatabaseUnavailable when the scheme is missing or not PostgreSQL's, and for a password with a bare @: what
    follows it would be taken for the host, and be shown. The text is never repeated in the message, nor in its cause:
    it may hold a password.
    """
    scheme, separator, _ = text.strip().partition("://")
    if not separator or not re.fullmatch(r"[\w+.-]+", scheme):
        raise DatabaseUnavailable(
            "The database URL has no scheme; it must begin with postgresql://.",
            hint=f"Set FLYWHEEL_DATABASE_URL to a URL such as {_EXAMPLE}.",
        )
    if scheme not in _ACCEPTED:
        raise DatabaseUnavailable(
            f"The database URL has the scheme {scheme!r}; Flywheel runs on PostgreSQL only.",
            hint=f"Set FLYWHEEL_DATABASE_URL to a URL such as {_EXAMPLE}.",
        )
    unreadable = DatabaseUnavailable(
        "The database URL cannot be read.",
        hint=f"Set FLYWHEEL_DATABASE_URL to a URL such as {_EXAMPLE}; escape special characters as %XX (@ is %40).",
    )
    before_query = text.partition("://")[2].partition("?")[0]
    if before_query.partition(":")[2].count("@") > 1:
        raise unreadable
    try:
        url = sa.make_url(text.strip().replace(scheme, "postgresql", 1))
    except (sa.exc.ArgumentError, ValueError):
        raise unreadable from None
    return url.set(drivername=DRIVER)


def libpq_url(url: URL) -> str:
    """The whole URL without a driver, as psql and all of libpq take it. It holds the password: hand it on, never show it."""
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


def shown_url(url: URL) -> str:
    """Return the URL as people and logs may see it: without driver, and `***` for the password and for most options.

    A password may stand among the options too, under its own name, another's or a misspelt one; so the values of those
    alone are shown that are known to be harmless. With no such option and no password it is the URL itself, for psql.
    """
    query = {key: value if key in _HARMLESS else _HIDDEN for key, value in url.query.items()}
    shown = url.set(drivername="postgresql", query=query).render_as_string(hide_password=True)
    return shown.replace(f"={quote_plus(_HIDDEN)}", f"={_HIDDEN}")


def verify_server(url: URL) -> None:
    """Connect once and verify the server's version.

    Raises DatabaseUnavailable naming the server (never its password) and the reason.
    """
    shown = shown_url(url)
    engine = _engine(url, poolclass=sa.NullPool)
    try:
        with engine.connect() as connection:
            version = int(connection.execute(sa.text("SHOW server_version_num")).scalar_one())
            spoken = str(connection.execute(sa.text("SHOW server_version")).scalar_one())
    except (sa.exc.OperationalError, sa.exc.ProgrammingError) as error:
        lines = [line.strip() for line in str(error.orig).splitlines() if line.strip()]
        reason = (lines[0] if lines else "no reason given").rstrip(".")
        raise DatabaseUnavailable(
            f"The database {shown} cannot be reached: {_without_values(reason, url)}.",
            hint="Start that server or correct FLYWHEEL_DATABASE_URL; unset it to use the embedded database.",
        ) from None  # the driver's own words, which a traceback would add, may repeat what is hidden here
    finally:
        engine.dispose()
    if version < MINIMUM_SERVER_VERSION:
        raise DatabaseUnavailable(
            f"The database {shown} is PostgreSQL {spoken}; Flywheel needs version 15 or later.",
            hint="Upgrade that server, or unset FLYWHEEL_DATABASE_URL to use the embedded PostgreSQL 18.",
        )


def _without_values(said: str, url: URL) -> str:
    """Hide in a complaint of libpq or the server the values that `shown_url` hides: both repeat what they refuse."""
    for key, given in url.query.items():
        if key not in _HARMLESS | _NEVER_REPEATED:
            for word in re.split(r"[\s=]+", given if isinstance(given, str) else " ".join(given)):
                said = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", _HIDDEN, said) if word else said
    return said


def open_engine(url: URL | str | None = None) -> Engine:
    """Open an engine: sessions in UTC, named `flywheel`, dead pooled connections replaced unnoticed.

    Statements are not compiled: what a tick asks ends before its compilation pays (counting 1 M rows: 0.80 s with, 0.69 s
    without).

    None stands for `resolve_url()`. Raises DatabaseUnavailable as `resolve_url` does; the server is verified
    by one connection.
    """
    if url is None:
        return _engine(resolve_url())
    resolved = parse_url(url if isinstance(url, str) else url.render_as_string(hide_password=False))
    verify_server(resolved)
    return _engine(resolved)


def dagster_url(url: URL) -> str:
    """URL of the same database for dagster-postgres: psycopg2, and tables in the schema `dagster`.

    The text holds the password: hand it on in the environment, never in a file.
    """
    options = _with_option(url, "-csearch_path=dagster -cjit=off")
    return (
        url.set(drivername="postgresql+psycopg2")
        .update_query_dict({"options": options})
        .render_as_string(hide_password=False)
    )


def _with_option(url: URL, option: str) -> str:
    given = url.query.get("options", "")
    text = given if isinstance(given, str) else " ".join(given)
    return f"{text} {option}".strip()


def _engine(url: URL, *, poolclass: type[sa.Pool] | None = None) -> Engine:
    arguments: dict[str, object] = {"options": _with_option(url, "-ctimezone=UTC -cjit=off")}
    if "application_name" not in url.query:
        arguments["application_name"] = APPLICATION_NAME
    if "connect_timeout" not in url.query:
        arguments["connect_timeout"] = CONNECT_TIMEOUT_SECONDS
    if not get_settings().prepare_statements:
        arguments["prepare_threshold"] = None  # of psycopg: never
    # What a statement was given may name hosts and people; its failure goes into logs and into Dagster's storage.
    engine = sa.create_engine(
        url, connect_args=arguments, pool_pre_ping=True, poolclass=poolclass, hide_parameters=True
    )
    sa.event.listen(engine, "connect", _look_for_the_client)
    return engine


def _look_for_the_client(connection: psycopg.Connection, _: object) -> None:
    """Have the server look whether the client is still there, in mid-statement too, and end the statement if not.

    Otherwise a run that was cancelled or killed leaves its statement behind: a refresh that nobody waits for any more
    goes on, and holds the refresh lock until it is done.
    """
    try:
        connection.execute(_LOOK)
        connection.commit()
    except psycopg.errors.InvalidParameterValue:  # a server on Windows cannot look; there it ends with its statement
        connection.rollback()
