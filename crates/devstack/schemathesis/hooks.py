"""What the documents say in words alone."""

import re
import uuid

import schemathesis
from schemathesis.generation import GenerationMode


@schemathesis.hook
def before_call(context, case, kwargs):
    query, headers = case.query or {}, case.headers or {}
    # A wait takes the token that is waited for, and one wait that is allowed is as good as another.
    if re.fullmatch(r"[0-9]{1,4}ms|[0-9]s|10s", str(query.get("wait", ""))):
        if "after" in query:
            query["wait"] = "5ms"
        else:
            del query["wait"]
    if case.meta is not None and case.meta.generation.mode == GenerationMode.POSITIVE:
        # A key belongs to one body.
        if "Idempotency-Key" in headers:
            headers["Idempotency-Key"] = str(uuid.uuid4())
        # A condition has tags, as its pattern says. (Of this header the tool minds no pattern.)
        if not re.fullmatch(r'\*|((W/)?"[!#-~]*"( *, *)?)+', headers.get("If-Match", "*")):
            headers["If-Match"] = "*"
        # A cpf has no decimal point. (For JSON Schema 1.0 is an integer.)
        if isinstance(case.body, dict) and isinstance(case.body.get("cpf"), float):
            case.body["cpf"] = int(case.body["cpf"])
        # An amount has four decimals.
        if isinstance(case.body, dict) and isinstance(case.body.get("value"), float):
            case.body["value"] = round(case.body["value"], 4)


@schemathesis.check
def only_waiting_is_unavailable(ctx, response, case):
    """A token that nobody was given is waited for in vain. Whatever else is a 503 is an error."""
    if response.status_code == 503:
        assert response.json()["type"] == "/problems/not-there-yet", response.text
