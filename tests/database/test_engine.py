"""Which database: URLs, refusals in one sentence, sessions."""

from __future__ import annotations

import multiprocessing
import socket
import time
import traceback
from pathlib import Path

import pytest
import sqlalchemy as sa

from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import dagster_url, open_engine, parse_url, resolve_url, shown_url
from flywheel_pipeline.database.settings import Settings, get_settings
from flywheel_pipeline.errors import DatabaseUnavailable, UsageError

FORK = multiprocessing.get_context("fork")


@pytest.mark.parametrize(
    "text", ["localhost/flywheel", "user:secret@host:5432/db", "flywheel", "user:secret@postgresql://host/db"]
)
def test_a_url_without_scheme_is_refused_and_never_repeated(text: str) -> None:
    with pytest.raises(DatabaseUnavailable, match="has no scheme; it must begin with postgresql://") as refusal:
        parse_url(text)
    assert "secret" not in str(refusal.value)
    assert "FLYWHEEL_DATABASE_URL" in (refusal.value.hint or "")


@pytest.mark.parametrize("scheme", ["mysql", "sqlite", "postgresql+asyncpg", "http"])
def test_another_database_system_is_refused(scheme: str) -> None:
    with pytest.raises(DatabaseUnavailable, match=f"scheme '{scheme.replace('+', '.')}'; Flywheel runs on PostgreSQL"):
        parse_url(f"{scheme}://host/db")


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg", "postgresql+psycopg2"])
def test_every_spelling_of_postgresql_comes_to_psycopg_3(scheme: str) -> None:
    url = parse_url(f"{scheme}://user:p%40ss@host:5433/db?sslmode=require")
    assert url.drivername == "postgresql+psycopg"
    assert (url.username, url.password, url.host, url.port, url.database) == (
        "user",
        "p@ss",
        "host",
        5433,
        "db",
    )
    assert url.query["sslmode"] == "require"


def test_a_port_that_is_no_number_is_refused_in_a_sentence() -> None:
    with pytest.raises(DatabaseUnavailable, match="cannot be read"):
        parse_url("postgresql://host:port/db")


def test_a_server_that_is_not_there_is_named_without_its_password() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        with pytest.raises(DatabaseUnavailable, match="cannot be reached") as refusal:
            open_engine(f"postgresql://user:secret@127.0.0.1:{port}/db")
    message = str(refusal.value)
    assert f"postgresql://user:***@127.0.0.1:{port}/db" in message
    assert "secret" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("u:hunter2@h:5433/db", "u:***@h:5433/db"),
        ("u@h/db?password=hunter2", "u@h/db?password=***"),
        ("u@h/db?pasword=hunter2&PASSWORD=hunter2", "u@h/db?PASSWORD=***&pasword=***"),
        (
            "u@h/db?sslmode=require&sslpassword=hunter2&sslkey=/k",
            "u@h/db?sslkey=%2Fk&sslmode=require&sslpassword=***",
        ),
        ("u@h/db?options=-capp.key%3Dhunter2", "u@h/db?options=***"),
        ("u@h/db?x=hunter2&x=hunter2&host=a:1&host=b:2", "u@h/db?host=a%3A1&host=b%3A2&x=***"),
        ("user@server:hunter2@h/db", "user%40server:***@h/db"),
        (
            "u@/db?host=/tmp/s&port=5433&application_name=mine&connect_timeout=3",
            "u@/db?application_name=mine&connect_timeout=3&host=%2Ftmp%2Fs&port=5433",
        ),
    ],
)
def test_a_url_is_shown_with_no_secret_and_with_all_that_says_where_it_leads(given: str, shown: str) -> None:
    assert shown_url(parse_url(f"postgresql://{given}")) == f"postgresql://{shown}"


@pytest.mark.parametrize("given", ["u:hun@ter2@127.0.0.1:1/db", "u:hun@t/er2@127.0.0.1:1/db", "u:hunter2"])
def test_a_password_that_cannot_be_told_from_the_host_is_refused_and_never_repeated(given: str) -> None:
    with pytest.raises(DatabaseUnavailable, match="cannot be read") as refusal:
        parse_url(f"postgresql://{given}")
    assert "ter2" not in "".join(traceback.format_exception(refusal.value)).replace(given, "")
    assert "%40" in (refusal.value.hint or "")


@pytest.mark.parametrize(
    "option",
    ["password=hunter2", "pasword=hunter2", "sslpassword=hunter2", "gssdelegation=hunter2", "sslsni=hunter2"],
)
def test_neither_the_url_nor_the_complaint_about_it_shows_the_value_of_an_option(option: str) -> None:
    with pytest.raises(DatabaseUnavailable, match="cannot be reached") as refusal:
        open_engine(f"postgresql://u@127.0.0.1:1/db?{option}")
    assert f"?{option.partition('=')[0]}=***" in refusal.value.message
    # Dagster's event log keeps the causes as well.
    assert "hunter2" not in refusal.value.message
    assert refusal.value.__suppress_context__
    assert refusal.value.__cause__ is None


def test_what_the_server_says_of_an_option_does_not_repeat_it(server: EmbeddedServer) -> None:
    with pytest.raises(DatabaseUnavailable, match="cannot be reached") as refusal:
        open_engine(server.url.update_query_dict({"options": "-cwork_mem=hunter2"}))
    assert 'invalid value for parameter "work_mem": "***"' in refusal.value.message


def test_a_database_that_does_not_exist_is_named(server: EmbeddedServer) -> None:
    with pytest.raises(DatabaseUnavailable, match='database "absent" does not exist'):
        open_engine(server.url.set(database="absent"))


def test_a_connection_option_that_libpq_does_not_know_is_refused_in_a_sentence(
    server: EmbeddedServer,
) -> None:
    with pytest.raises(DatabaseUnavailable, match="invalid connection option"):
        open_engine(server.url.update_query_dict({"no_such_option": "1"}))


def test_sessions_are_in_utc_and_carry_our_name(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        assert connection.execute(sa.text("SHOW timezone")).scalar_one() == "UTC"
        assert connection.execute(sa.text("SHOW application_name")).scalar_one() == "flywheel"


def test_options_of_the_given_url_are_kept(server: EmbeddedServer) -> None:
    url = server.url.update_query_dict({"options": "-cwork_mem=7MB", "application_name": "mine"})
    engine = open_engine(url)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SHOW work_mem")).scalar_one() == "7MB"
        assert connection.execute(sa.text("SHOW timezone")).scalar_one() == "UTC"
        assert connection.execute(sa.text("SHOW application_name")).scalar_one() == "mine"
    engine.dispose()


def test_a_pooled_connection_that_died_is_replaced_unnoticed(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        pid = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
    killer = open_engine(engine.url)
    with killer.connect() as connection:
        connection.execute(sa.text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
    killer.dispose()
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one() != pid


def test_dagsters_url_is_for_psycopg2_and_its_own_schema() -> None:
    text = dagster_url(parse_url("postgresql://user:p%40ss@host/db?options=-cwork_mem%3D7MB"))
    url = sa.make_url(text)
    assert url.drivername == "postgresql+psycopg2"
    assert url.password == "p@ss"  # noqa: S105
    assert url.query["options"] == "-cwork_mem=7MB -csearch_path=dagster -cjit=off"


def test_the_environment_decides_which_database(
    monkeypatch: pytest.MonkeyPatch, database_url: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLYWHEEL_HOME", str(tmp_path))
    monkeypatch.setenv("FLYWHEEL_DATABASE_URL", database_url)
    assert resolve_url().render_as_string(hide_password=False) == database_url
    monkeypatch.setenv("FLYWHEEL_DATABASE_URL", "")
    assert resolve_url(start=False) == EmbeddedServer(tmp_path).url
    assert not (tmp_path / "postgres").exists(), "start=False starts nothing"


def test_the_home_is_absolute_and_by_default_in_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLYWHEEL_HOME", raising=False)
    settings = get_settings()
    assert settings.home == tmp_path.resolve() / ".flywheel"
    assert settings.dagster_home == settings.home / "dagster"
    assert settings.logs == settings.home / "logs"


@pytest.mark.parametrize("port", ["0", "70000", "three thousand"])
def test_a_setting_that_is_not_usable_is_named(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("FLYWHEEL_UI_PORT", port)
    with pytest.raises(UsageError, match="FLYWHEEL_UI_PORT is not usable"):
        get_settings()


def test_a_password_is_not_printed_with_the_settings() -> None:
    settings = Settings(database_url="postgresql://user:secret@host/db")
    assert "secret" not in repr(settings)


def test_the_error_of_a_statement_repeats_none_of_its_values(engine: sa.Engine) -> None:
    many = [{"value": "HOST-OF-A-CLINIC", "number": number} for number in range(3)]
    for values in (many[0], many):
        with pytest.raises(sa.exc.ProgrammingError, match="does not exist") as failed, engine.connect() as connection:
            connection.execute(sa.text("INSERT INTO no_table VALUES (:value, :number)"), values)
        assert "HOST-OF" not in "".join(traceback.format_exception(failed.value))


def test_the_server_ends_what_a_client_that_is_gone_was_waiting_for(engine: sa.Engine) -> None:
    child = FORK.Process(target=_ask_for_long, args=(engine.url,), daemon=True)
    child.start()
    asked = (
        "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(600)' AND datname = current_database()"
    )
    try:
        _until(engine, asked, 1)
    finally:
        child.kill()
        child.join()
    _until(engine, asked, 0)  # and not after ten minutes


def _ask_for_long(url: sa.URL) -> None:
    with open_engine(url).connect() as connection:
        connection.exec_driver_sql("SELECT pg_sleep(600)")


def _until(engine: sa.Engine, question: str, answer: int, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while connection.exec_driver_sql(question).scalar_one() != answer:
            assert time.monotonic() < deadline
            time.sleep(0.05)
