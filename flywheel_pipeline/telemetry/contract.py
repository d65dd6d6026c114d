"""The contract of execution telemetry: what an agent, a file or a script may send, and why a row is refused.

Belongs here: the one pydantic model of a post, its limits, and the reasons of a refusal; all of it pure.
Does not belong here: reading files, writing to the database (`intake`), refused rows at rest (`rejects`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from operator import itemgetter
from typing import Annotated, Any, Final, Literal, NamedTuple

import pydantic_core
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    ValidationError,
)
from pydantic_core import PydanticCustomError

#: Longest line, post or CSV record that is read, in bytes (1 MiB). Real posts are 0.6 to 4 kB.
LINE_LIMIT_BYTES: Final = 1 << 20
#: How far an agent's clock may run ahead of ours before its rows are parked.
CLOCK_TOLERANCE: Final = timedelta(minutes=10)
#: How old an execution may be. Older ones come from appliances whose clock was reset, not from queues.
OLDEST: Final = timedelta(days=730)
#: What stands in appliance_id when an agent does not send it; older agents never do.
UNKNOWN_APPLIANCE: Final = "unknown"

#: Legacy runbook ids that tell the level of a row without resolution_level; twin of flywheel_level in SQL.
_PREFIXES_WITH_LEVEL: Final = ("L1-", "RB-AUTO-", "L2-")
_INT4: Final = 2**31 - 1
_SHORTEST_TIME: Final = len("2026-02-15T09:00")
_SHOWN_CHARACTERS: Final = 80
_SHOWN_PROBLEMS: Final = 3
_from_iso_format = datetime.fromisoformat
_to_json = pydantic_core.to_json


def _instant(value: Any) -> datetime:
    # Python's parser and not pydantic's: it gives the one UTC object, and Python compares times of one tzinfo
    # object without asking for their offsets (13 us a row in all, against 18).
    if isinstance(value, str) and len(value) >= _SHORTEST_TIME:
        try:
            at = _from_iso_format(value)
        except ValueError:
            at = None
        if at is not None:
            zone = at.tzinfo
            if zone is UTC:
                return at
            if zone is None:
                return at.replace(tzinfo=UTC)  # agents run in UTC, and some releases leave the offset out
            try:
                return at.astimezone(UTC)
            except OverflowError:
                return at  # an hour before the first year or after the last one
    raise PydanticCustomError("no_time", "must be an ISO 8601 time such as 2026-02-15T09:00:00Z")


def _json_text(value: Any) -> str | None:
    if value is None:
        return None
    text = _to_json(value).decode()
    if ("NaN" in text or "Infinity" in text) and not _finite(value):
        raise ValueError("holds a number that is not finite")
    return text


def _finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return True


def _or_unknown(value: str | None) -> str:
    return value or UNKNOWN_APPLIANCE


def _micro_dollars(value: Decimal) -> Decimal:
    return value.quantize(Decimal("0.000001"))


_Name = Annotated[str, StringConstraints(min_length=1, max_length=255)]
_Text50 = Annotated[str, StringConstraints(max_length=50)]
_Text100 = Annotated[str, StringConstraints(max_length=100)]
_Text255 = Annotated[str, StringConstraints(max_length=255)]
_Instant = Annotated[datetime, PlainValidator(_instant)]
_Json = Annotated[Any, AfterValidator(_json_text)]
_Count = Annotated[int, Field(ge=0, le=_INT4)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
_Cost = Annotated[Decimal, Field(ge=0, le=Decimal("999999.999999")), AfterValidator(_micro_dollars)]


class Execution(BaseModel):
    """One healing attempt as the agent describes it: the columns of `execution_telemetry` that it may send.

    Strict: nothing is converted ("true" is no boolean, 1 is no boolean, "5" is no number), and an unknown
    field is refused. Times are ISO 8601 and UTC where they name no offset; durations are seconds;
    `confidence` is a fraction in [0, 1]; the JSON columns hold JSON text after validation.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    execution_id: _Name
    incident_id: _Text255 | None = None
    appliance_id: Annotated[_Text255 | None, AfterValidator(_or_unknown)] = UNKNOWN_APPLIANCE
    runbook_id: _Name
    rule_id: _Text255 | None = None
    action: _Text255 | None = None
    hostname: _Name
    platform: _Text50 | None = None
    incident_type: _Text255 | None = None
    agent_version: _Text50 | None = None
    started_at: _Instant | None = None
    completed_at: _Instant | None = None
    duration_seconds: Annotated[float, Field(ge=0)] | None = None
    success: bool
    status: _Text50 | None = None
    verification_passed: bool | None = None
    confidence: _Fraction | None = None
    resolution_level: Literal["L1", "L2", "L3"] | None = None
    state_before: _Json = None
    state_after: _Json = None
    state_diff: _Json = None
    executed_steps: _Json = None
    error_message: str | None = None
    error_step: Annotated[int, Field(ge=-1, le=_INT4)] | None = None
    error_traceback: str | None = None
    failure_type: _Text100 | None = None
    retry_count: _Count | None = None
    was_correct_runbook: bool | None = None
    was_correct_diagnosis: bool | None = None
    manual_intervention_needed: bool | None = None
    human_feedback: str | None = None
    evidence_bundle_id: _Text255 | None = None
    tags: _Json = None
    cost_usd: _Cost | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    pattern_signature: _Text255 | None = None
    reasoning: str | None = None
    chaos_campaign_id: _Text255 | None = None


class _ReportedExecution(Execution):
    """An execution inside a post; some releases repeat the site there, and it must be the same one."""

    site_id: _Name | None = None


class ExecutionPost(BaseModel):
    """What an agent posts to /api/agent/executions: `{"site_id", "reported_at", "execution": {...}}`.

    `reported_at` is the agent's clock when it wrote this version of the execution. It orders corrections.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    site_id: _Name
    reported_at: _Instant
    execution: _ReportedExecution


class FlatRow(Execution):
    """The same row as direct columns: a CSV or Parquet row, or a flat JSON object.

    `reported_at` is optional here, since tables of the old system never had it; without it a row can add an
    execution or repeat it, and cannot correct one.
    """

    site_id: _Name
    reported_at: _Instant | None = None
    created_at: _Instant | None = None


#: Columns of `execution_telemetry` that a row carries into the database, in the order of ParsedRow.values.
COLUMNS: Final[tuple[str, ...]] = ("site_id", "reported_at", "created_at", *Execution.model_fields)
#: Columns that a flat file may have.
FLAT_COLUMNS: Final = frozenset(FlatRow.model_fields)
#: Columns that the database makes: an export carries them, and they are not read.
MADE_COLUMNS: Final = frozenset({"id", "event_at"})
#: Columns that a flat file must have.
REQUIRED_COLUMNS: Final = frozenset(name for name, field in FlatRow.model_fields.items() if field.is_required())
#: Columns that hold JSON.
JSON_COLUMNS: Final = frozenset({"state_before", "state_after", "state_diff", "executed_steps", "tags"})

_execution_values = itemgetter(*Execution.model_fields)


def _validated_json(model: type[BaseModel]) -> Callable[[bytes], dict[str, Any]]:
    """`model_validate_json`, giving the fields as dicts: without objects around them it takes two thirds of the time."""
    read: Callable[[bytes], dict[str, Any]] = pydantic_core.SchemaValidator(
        _as_typed_dicts(model.__pydantic_core_schema__)
    ).validate_json
    return read


def _as_typed_dicts(schema: Any) -> Any:
    """The same schema with a typed dict, of the same strictness, in place of each model."""
    if isinstance(schema, list):
        return [_as_typed_dicts(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") != "model":
        return {key: _as_typed_dicts(value) for key, value in schema.items()}
    fields = {
        name: pydantic_core.core_schema.typed_dict_field(
            _as_typed_dicts(field["schema"]), required=field["schema"]["type"] != "default"
        )
        for name, field in schema["schema"]["fields"].items()
    }
    return pydantic_core.core_schema.typed_dict_schema(fields, config=schema["config"])


_read_post: Final = _validated_json(ExecutionPost)
_read_flat: Final = _validated_json(FlatRow)


class ParsedRow(NamedTuple):
    """A row that keeps the contract.

    `line_number` is 1-based in its source (None: no source with lines); `values` follow COLUMNS.
    """

    line_number: int | None
    execution_id: str
    values: tuple[Any, ...]

    def received_by(self, received_at: datetime) -> ParsedRow:
        """The same row with an arrival no later than `received_at` (aware), for a row that waited with us."""
        site_id, reported_at, created_at, *rest = self.values
        return self._replace(values=(site_id, reported_at, min(created_at, received_at), *rest))


@dataclass(frozen=True, slots=True)
class Reject:
    """Why a row was refused: a stable `reason_code`, and a `reason` that names field and value."""

    reason_code: str
    reason: str


def parse_line(
    raw: bytes,
    line_number: int | None,
    *,
    received_at: datetime,
    complete: bool = True,
    live: bool = False,
) -> ParsedRow | Reject:
    """Hold one JSON text, a post or a flat row, against the contract.

    `received_at` (aware) is the clock that decides what lies in the future. `complete` is False for a last
    line without its newline, which is called truncated if it does not parse. `live` is True for a post that
    has just arrived: its arrival time is `received_at`; otherwise the earlier of the agent's and our clock.

    Never raises on bad input: it returns a Reject.
    """
    if len(raw) > LINE_LIMIT_BYTES:
        return too_long(len(raw))
    try:
        if b'"execution"' in raw:
            try:
                post = _read_post(raw)
            except ValidationError as error:
                if not _is_flat(error):
                    return _refusal(raw, error, complete)
            else:
                return _row_of_post(post, raw, line_number, received_at, live)
        return _row_of_flat(_read_flat(raw), raw, line_number, received_at, live)
    except ValidationError as error:
        return _refusal(raw, error, complete)


def too_long(length_bytes: int) -> Reject:
    """The refusal of a line, post or record of `length_bytes`, which is over LINE_LIMIT_BYTES."""
    return Reject("line_too_long", f"{length_bytes:,} bytes; the limit is {LINE_LIMIT_BYTES:,}")


def _row_of_post(
    post: dict[str, Any], raw: bytes, line_number: int | None, received_at: datetime, live: bool
) -> ParsedRow | Reject:
    execution = post["execution"]
    site_id, reported_at = post["site_id"], post["reported_at"]
    if execution["site_id"] is not None and execution["site_id"] != site_id:
        return Reject(
            "conflicting_identity",
            f"site_id is {_shown(site_id)} and execution.site_id is {_shown(execution['site_id'])}",
        )
    created_at = received_at if live or received_at < reported_at else reported_at
    return _checked(execution, raw, line_number, site_id, reported_at, created_at, received_at)


def _row_of_flat(
    row: dict[str, Any], raw: bytes, line_number: int | None, received_at: datetime, live: bool
) -> ParsedRow | Reject:
    arrivals = [received_at]
    if not live:
        arrivals += [at for at in (row["reported_at"], row["created_at"]) if at is not None]
    return _checked(row, raw, line_number, row["site_id"], row["reported_at"], min(arrivals), received_at)


def _checked(
    execution: dict[str, Any],
    raw: bytes,
    line_number: int | None,
    site_id: str,
    reported_at: datetime | None,
    created_at: datetime,
    received_at: datetime,
) -> ParsedRow | Reject:
    values = (site_id, reported_at, created_at, *_execution_values(execution))
    reject = (
        _blank(execution, site_id)
        or _skewed(execution, reported_at, created_at, received_at)
        or _contradiction(execution)
    )
    if reject is not None:
        return reject
    if b"\\" in raw and b"\\u0000" in raw:  # one byte is found ten times as fast as six
        for name, value in zip(COLUMNS, values, strict=True):
            if isinstance(value, str) and _holds_nul(name, value):
                return Reject("nul_character", f"{name} holds a NUL character: {_shown(value)}")
    return ParsedRow(line_number, execution["execution_id"], values)


def _blank(execution: dict[str, Any], site_id: str) -> Reject | None:
    if not (
        site_id.isspace()
        or execution["execution_id"].isspace()
        or execution["hostname"].isspace()
        or execution["runbook_id"].isspace()
    ):
        return None
    texts = {name: execution[name] for name in ("execution_id", "hostname", "runbook_id")} | {"site_id": site_id}
    for name in ("execution_id", "site_id", "hostname", "runbook_id"):
        if texts[name].isspace():
            code = "missing_execution_id" if name == "execution_id" else "missing_field"
            return Reject(code, f"{name} is blank: {_shown(texts[name])}")
    return None


def _skewed(
    execution: dict[str, Any], reported_at: datetime | None, created_at: datetime, received_at: datetime
) -> Reject | None:
    """Refuse what lies after its report or arrival (the earlier is `created_at`), or too far back."""
    earliest = received_at - OLDEST
    latest = created_at + CLOCK_TOLERANCE
    started_at, completed_at = execution["started_at"], execution["completed_at"]
    if (
        earliest <= created_at
        and (reported_at is None or reported_at <= received_at)
        and (started_at is None or earliest <= started_at <= latest)
        and (completed_at is None or (started_at or earliest) <= completed_at <= latest)
    ):
        return None
    for name, at, limit in (
        ("reported_at", reported_at, received_at),
        ("started_at", started_at, created_at),
        ("completed_at", completed_at, created_at),
        ("created_at", created_at, received_at),
    ):
        if at is None:
            continue
        if at > limit + CLOCK_TOLERANCE:
            minutes = CLOCK_TOLERANCE.seconds // 60
            came = "was received" if limit is received_at else "was reported or received"
            return Reject(
                "future_event",
                f"{name} is {at.isoformat()}, more than {minutes} minutes after it {came}, {limit.isoformat()}",
            )
        if at < earliest:
            return Reject(
                "too_old",
                f"{name} is {at.isoformat()}, more than {OLDEST.days} days before it was received, "
                f"{received_at.isoformat()}",
            )
    if started_at is not None and completed_at is not None and completed_at < started_at:
        return Reject(
            "ends_before_start",
            f"completed_at is {completed_at.isoformat()}, before started_at {started_at.isoformat()}",
        )
    return None


def _contradiction(execution: dict[str, Any]) -> Reject | None:
    success, status = execution["success"], execution["status"]
    if status == ("failure" if success else "success"):
        return Reject("contradiction", f"success is {str(success).lower()} and status is {status!r}")
    if execution["resolution_level"] is None and not (
        execution["rule_id"] or execution["runbook_id"].startswith(_PREFIXES_WITH_LEVEL)
    ):
        return Reject(
            "missing_field",
            f"resolution_level is missing, and runbook_id {_shown(execution['runbook_id'])} does not tell it",
        )
    return None


def _holds_nul(name: str, value: str) -> bool:
    if name in JSON_COLUMNS:
        return _nul_inside(pydantic_core.from_json(value))
    return "\x00" in value


def _nul_inside(value: Any) -> bool:
    if isinstance(value, str):
        return "\x00" in value
    if isinstance(value, dict):
        return any(_nul_inside(key) or _nul_inside(item) for key, item in value.items())
    if isinstance(value, list):
        return any(map(_nul_inside, value))
    return False


def _is_flat(error: ValidationError) -> bool:
    return any(
        problem["type"] == "missing" and problem["loc"] == ("execution",)
        for problem in error.errors(include_url=False, include_context=False)
    )


_CODES: Final[Mapping[str, str]] = {
    "extra_forbidden": "unknown_field",
    "missing": "missing_field",
    "string_too_short": "missing_field",
    "string_too_long": "too_long",
    "greater_than_equal": "out_of_range",
    "less_than_equal": "out_of_range",
    "finite_number": "out_of_range",
    "value_error": "out_of_range",
    "int_parsing_size": "out_of_range",
    "literal_error": "unknown_value",
}

_WORDS: Final[Mapping[str, str]] = {
    "missing": "is missing",
    "extra_forbidden": "is no field of the contract",
    "string_type": "must be a text",
    "bool_type": "must be true or false",
    "string_too_short": "is blank",
    "string_too_long": "is too long",
    "dict_type": "must be an object",
}


def _refusal(raw: bytes, error: ValidationError, complete: bool) -> Reject:
    if b"\x00" in raw:  # which no JSON text holds
        return Reject("nul_character", f"byte {raw.index(0) + 1} is a NUL character")
    problems = error.errors(include_url=False)
    first = problems[0]
    if first["type"] == "json_invalid":
        return _unreadable(raw, str(first["ctx"]["error"]), complete)
    if first["type"] == "dict_type" and not first["loc"]:
        return Reject("not_an_object", f"an execution is a JSON object, not {_shown(first['input'])}")
    told = [(_code(problem), _told(problem)) for problem in problems]
    code = "missing_execution_id" if any(c == "missing_execution_id" for c, _ in told) else told[0][0]
    told.sort(key=lambda pair: pair[0] != code)
    sentences = [sentence for _, sentence in told[:_SHOWN_PROBLEMS]]
    if len(told) > _SHOWN_PROBLEMS:
        sentences.append(f"and {len(told) - _SHOWN_PROBLEMS} more")
    return Reject(code, "; ".join(sentences))


def _unreadable(raw: bytes, problem: str, complete: bool) -> Reject:
    if not complete:
        return Reject("truncated", f"the last line ends without a newline and does not parse: {problem}")
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return Reject("invalid_utf8", f"byte {error.start + 1} is not UTF-8 ({raw[error.start]:#04x})")
    return Reject("invalid_json", problem)


def _code(problem: pydantic_core.ErrorDetails) -> str:
    kind = problem["type"]
    code = _CODES.get(kind, "wrong_type")
    if kind != "missing" and code == "wrong_type" and problem["input"] is None:
        code = "missing_field"
    if code == "missing_field" and problem["loc"][-1] == "execution_id":
        return "missing_execution_id"
    return code


def _told(problem: pydantic_core.ErrorDetails) -> str:
    name = ".".join(map(str, problem["loc"]))
    kind = problem["type"]
    if kind == "missing":
        return f"{name} is missing"
    if kind != "extra_forbidden" and problem["input"] is None:
        return f"{name} is null"
    message = _WORDS.get(kind) or problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{name} {message}: {_shown(problem['input'])}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
