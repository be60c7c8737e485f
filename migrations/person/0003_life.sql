-- The whole life of a record: a status, answers that are kept for retries, and what goes with a person.

-- An inactive person takes no new items. What is there may still be changed and deleted.
--
-- This waits for open writers and stops those behind it, so it gives up soon: run it again then.
SET LOCAL lock_timeout = '2s';
ALTER TABLE person.person
    ADD COLUMN status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'inactive'));

-- The answers to POST requests that came with an Idempotency-Key, so that a retry gets the first answer again
-- and writes nothing. Stored in the statement that writes, so there is an answer exactly when there is a record;
-- and only for successes, so what failed may be tried again.
--   caller    whose key it is: nobody finds another's.
--   route     the path; for items with the cpf.
--   request   SHA-256 of the body: the same key with another body is a mistake of the client.
--   person_id whom the answer is about. With the person, it goes: a path names the cpf.
--   location, etag, body  the answer, as it was sent.
CREATE TABLE person.idempotency (
    caller     text        NOT NULL,
    route      text        NOT NULL,
    key        text        NOT NULL,
    request    bytea       NOT NULL,
    person_id  uuid        NOT NULL REFERENCES person.person (id) ON DELETE CASCADE,
    location   text        NOT NULL,
    etag       text        NOT NULL,
    body       text        NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (caller, route, key)
);
-- What goes with a person, and what goes by its age.
CREATE INDEX idempotency_person ON person.idempotency (person_id);
CREATE INDEX idempotency_age    ON person.idempotency (created_at);

-- What the API, and whoever operates it, needs and no more: the rights of before, and kept answers.
CREATE OR REPLACE FUNCTION person.grant_api(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA person TO %s', role);
    EXECUTE format('GRANT SELECT ON person.migration TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON person.person, person.income, person.asset, person.debt TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE ON person.republish TO %s', role);
    -- Locking a row before it is deleted takes the right to update some column of it.
    EXECUTE format('GRANT SELECT, INSERT, DELETE, UPDATE (created_at) ON person.idempotency TO %s', role);
END
$$;
-- Whoever writes already goes on to do so.
SELECT person.grant_api(r.grantee::regrole)
FROM pg_class c, aclexplode(c.relacl) r
WHERE c.oid = 'person.person'::regclass AND r.privilege_type = 'INSERT' AND r.grantee <> c.relowner;
