-- Deleting a person with very many items in bounded steps; keys that outlive their person; no samples.
--
-- The ALTERs wait for open writers and stop those behind them, so they give up soon: run it again then.
SET LOCAL lock_timeout = '2s';

-- Deleting a person deletes what refers to them, which takes as long as there is much of it. A person with more than
-- a thousand items and kept answers is emptied instead: the row stays, without cpf, name and address, until person-api
-- has removed the rest step by step. Everything finds a person by the cpf, so that nobody sees what is left.
ALTER TABLE person.person ALTER COLUMN cpf DROP NOT NULL;
ALTER TABLE person.person
    ADD CONSTRAINT person_emptied CHECK (cpf IS NOT NULL OR name = '' AND address IS NULL) NOT VALID;
CREATE INDEX person_emptied ON person.person (id) WHERE cpf IS NULL;

-- A create that is retried after the person was deleted must not create the person again. So of a kept answer the
-- digest of its key stays, for as long as the answer would have: caller and route are empty then, and `key` is the
-- digest in hexadecimal digits. One unique index holds both, so that the two cannot pass each other.
ALTER TABLE person.idempotency ALTER COLUMN person_id DROP NOT NULL;
CREATE FUNCTION person.key_digest(caller text, route text, key text) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN route = '' THEN pg_catalog.decode(key, 'hex')
                ELSE pg_catalog.sha256(pg_catalog.convert_to(pg_catalog.concat(
                         pg_catalog.length(caller), ' ', pg_catalog.length(route), ' ', caller, route, key), 'UTF8')) END;
CREATE UNIQUE INDEX idempotency_digest ON person.idempotency (person.key_digest(caller, route, key));

-- Of these columns ANALYZE keeps no samples: they would outlive the rows.
DO $$
DECLARE
    personal record;
BEGIN
    FOR personal IN
        SELECT c.oid::regclass AS relation, a.attname
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE c.relnamespace = 'person'::regnamespace AND (c.relname, a.attname) IN (
            ('person', 'cpf'), ('person', 'name'), ('person', 'address'), ('person', 'date_of_birth'),
            ('income', 'type'), ('income', 'value'), ('asset', 'type'), ('asset', 'value'), ('debt', 'value'),
            ('idempotency', 'route'), ('idempotency', 'key'), ('idempotency', 'request'),
            ('idempotency', 'location'), ('idempotency', 'etag'), ('idempotency', 'body'))
    LOOP
        EXECUTE format('ALTER TABLE %s ALTER COLUMN %I SET STATISTICS 0', personal.relation, personal.attname);
    END LOOP;
    ALTER INDEX person.idempotency_digest ALTER COLUMN 1 SET STATISTICS 0;
    -- What was sampled before. Only a superuser may; roles.sql does the same.
    IF current_setting('is_superuser')::boolean THEN
        DELETE FROM pg_catalog.pg_statistic s USING pg_catalog.pg_attribute a
        WHERE a.attrelid = s.starelid AND a.attnum = s.staattnum AND a.attstattarget = 0
          AND a.attrelid IN (SELECT c.oid FROM pg_catalog.pg_class c WHERE c.relnamespace = 'person'::regnamespace);
    END IF;
END
$$;

-- The lock of the one who republishes, until the session ends; false when another session has it. With the owner's
-- rights: the functions that take any advisory lock are not for the programs' roles.
CREATE FUNCTION person.try_republish() RETURNS boolean
    LANGUAGE sql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS $$ SELECT pg_try_advisory_lock(1886548846, 1) $$;
REVOKE EXECUTE ON FUNCTION person.try_republish() FROM PUBLIC;

-- What the API, and whoever operates it, needs and no more: the rights of before, to empty a kept answer, and to be
-- the one who republishes.
CREATE OR REPLACE FUNCTION person.grant_api(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA person TO %s', role);
    EXECUTE format('GRANT SELECT ON person.migration TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON person.person, person.income, person.asset, person.debt,'
                   ' person.idempotency TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE ON person.republish TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION person.try_republish() TO %s', role);
END
$$;
-- Whoever writes already goes on to do so.
SELECT person.grant_api(r.grantee::regrole)
FROM pg_class c, aclexplode(c.relacl) r
WHERE c.oid = 'person.person'::regclass AND r.privilege_type = 'INSERT' AND r.grantee <> c.relowner;
