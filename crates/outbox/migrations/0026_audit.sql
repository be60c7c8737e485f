-- What operators did to an outbox, and why.
--
-- A row is an action: a pause, a retry, a drop, a look at a body. It is committed before the action changes anything, so
-- there is no change without a row. Rows are only added. The triggers below refuse everything else to every role, so that
-- a mistake of a program or of its owner cannot thin the list out.
--
--   operator   the person, as the program that acts knows them: the name of a key, or USER@HOST.
--   db_role    the role of the session, which the server knows.
--   action     `pause`, `resume`, `retry`, `drop`, `show body`, ...
--   target     what it was done to: a relay name, an event.
--   why        in the operator's words. It is kept for good, so it names no person.
--   detail     what was chosen, and how much it was.
CREATE TABLE outbox.audit (
    id       bigint      PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    operator text        NOT NULL CHECK (length(operator) BETWEEN 1 AND 200),
    db_role  text        NOT NULL DEFAULT session_user,
    action   text        NOT NULL CHECK (length(action) BETWEEN 1 AND 100),
    target   text        NOT NULL CHECK (length(target) <= 1000),
    why      text        NOT NULL CHECK (length(why) BETWEEN 1 AND 1000),
    detail   jsonb       NOT NULL DEFAULT '{}'
);
-- The server keeps no samples of what people wrote.
ALTER TABLE outbox.audit
    ALTER COLUMN operator SET STATISTICS 0, ALTER COLUMN target SET STATISTICS 0,
    ALTER COLUMN why SET STATISTICS 0, ALTER COLUMN detail SET STATISTICS 0;
COMMENT ON TABLE outbox.audit IS
    'A row: what an operator did, to what, and why. Rows are added before the action, and never changed or removed.';

CREATE FUNCTION outbox.refuse_audit_change() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'outbox.audit only grows: its rows are not changed and not removed'
        USING ERRCODE = 'insufficient_privilege';
END
$$;
REVOKE EXECUTE ON FUNCTION outbox.refuse_audit_change() FROM PUBLIC;
CREATE TRIGGER audit_grows BEFORE UPDATE OR DELETE OR TRUNCATE ON outbox.audit
    FOR EACH STATEMENT EXECUTE FUNCTION outbox.refuse_audit_change();
ALTER TABLE outbox.audit ENABLE ALWAYS TRIGGER audit_grows;

-- The body of a stored event, or of one that a relay set aside, as a subscriber may see it: what is erased stays erased.
-- A role that may read bodies in no other way reads them with this function, and each reading is in the audit.
CREATE FUNCTION outbox.show_body(event_position bigint, by_operator text, reason text) RETURNS text
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    event record;
BEGIN
    SELECT e.id, e.payload::text AS body INTO event FROM outbox.readable e WHERE e.position = event_position;
    IF NOT FOUND THEN
        SELECT p.id, p.payload::text AS body INTO event FROM outbox.readable_parked p
        WHERE p.position = event_position LIMIT 1;
    END IF;
    INSERT INTO outbox.audit (operator, action, target, why, detail)
    VALUES (by_operator, 'show body', coalesce('event ' || event.id, 'position ' || event_position), reason,
            jsonb_build_object('position', event_position));
    RETURN event.body;
END
$$;
COMMENT ON FUNCTION outbox.show_body(bigint, text, text) IS
    'The body of the event at a position, null where there is none. That it was read is added to outbox.audit.';
REVOKE EXECUTE ON FUNCTION outbox.show_body(bigint, text, text) FROM PUBLIC;

-- What an operator's role needs to act, beside looking: to pause and resume a relay, to try again and to drop what was set
-- aside, and to add to the audit. No bodies.
CREATE FUNCTION outbox.grant_operator(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    PERFORM outbox.grant_reader(role);
    EXECUTE format('GRANT SELECT (id, name, paused_at, paused_by, dropped_by_hand),'
                   ' UPDATE (paused_at, paused_by, dropped_by_hand) ON outbox.relay TO %s', role);
    EXECUTE format('GRANT SELECT (relay, position, id, aggregate_type, aggregate_id, version, type, state, reason, detail,'
                   ' attempts, created_at, parked_at, last_attempt_at, next_attempt_at),'
                   ' UPDATE (next_attempt_at), DELETE ON outbox.parked TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT (operator, action, target, why, detail) ON outbox.audit TO %s', role);
END
$$;
COMMENT ON FUNCTION outbox.grant_operator(regrole) IS
    'Lets a role look at the outbox and act on its relays, without bodies.';

-- The same, and bodies, each reading of which is in the audit.
CREATE FUNCTION outbox.grant_bodies(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.show_body TO %s', role);
END
$$;
COMMENT ON FUNCTION outbox.grant_bodies(regrole) IS
    'Lets a role read the bodies of events with outbox.show_body, which notes each reading in outbox.audit.';

-- A role that operates an outbox with the relay's commands adds to the audit, too.
SELECT outbox.grant_operator(r.grantee::regrole)
FROM pg_class c, aclexplode(c.relacl) r
WHERE c.oid = 'outbox.parked'::regclass AND r.privilege_type = 'INSERT' AND r.grantee <> c.relowner;
